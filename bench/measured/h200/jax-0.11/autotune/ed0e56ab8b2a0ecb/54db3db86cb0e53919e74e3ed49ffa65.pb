
J
4
ed0e56ab8b2a0ecb 54db3db86cb0e53919e74e3ed49ffa65
fe9062d0fff82a66
	
€€€13.0.0