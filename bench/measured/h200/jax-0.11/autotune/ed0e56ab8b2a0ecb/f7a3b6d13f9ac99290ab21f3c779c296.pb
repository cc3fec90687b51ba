
J
4
ed0e56ab8b2a0ecb f7a3b6d13f9ac99290ab21f3c779c296
fe9062d0fff82a66
	
€€€13.0.0