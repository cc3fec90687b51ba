
J
4
ed0e56ab8b2a0ecb 135aaa6a3256ca3659c7bfe1eb1ed9f9
fe9062d0fff82a66
	
€€€13.0.0