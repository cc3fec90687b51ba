
J
4
ed0e56ab8b2a0ecb 5bda1d6499d51ddeef3be9c92832e255
fe9062d0fff82a66
	
€€€13.0.0