
J
4
ed0e56ab8b2a0ecb e2e8aa10f4e1d553a6cc3bc1455648de
fe9062d0fff82a66?
	
 (0(a77e7c793abc0d0c923a9afb275058e2fe57a198