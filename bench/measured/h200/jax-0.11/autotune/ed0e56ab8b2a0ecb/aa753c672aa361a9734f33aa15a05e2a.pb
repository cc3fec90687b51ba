
J
4
ed0e56ab8b2a0ecb aa753c672aa361a9734f33aa15a05e2a
fe9062d0fff82a66
	
€€€13.0.0