
J
4
ed0e56ab8b2a0ecb 72dd4564db5be7ebbae93fc465a76012
fe9062d0fff82a66
	
€€€13.0.0