
J
4
ed0e56ab8b2a0ecb 203a47eb1d02bdb200ff6b4bbb1189ed
fe9062d0fff82a66?
	
€ ((a77e7c793abc0d0c923a9afb275058e2fe57a198