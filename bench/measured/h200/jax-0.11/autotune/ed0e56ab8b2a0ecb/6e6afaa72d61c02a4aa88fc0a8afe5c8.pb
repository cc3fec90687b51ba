
J
4
ed0e56ab8b2a0ecb 6e6afaa72d61c02a4aa88fc0a8afe5c8
fe9062d0fff82a66
	
€€€13.0.0