
J
4
ed0e56ab8b2a0ecb 7bcdd1458bfc23eade25c33a95107153
fe9062d0fff82a66
	
€€€13.0.0