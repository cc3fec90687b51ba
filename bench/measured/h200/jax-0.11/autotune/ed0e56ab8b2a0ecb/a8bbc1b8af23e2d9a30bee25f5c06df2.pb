
J
4
ed0e56ab8b2a0ecb a8bbc1b8af23e2d9a30bee25f5c06df2
fe9062d0fff82a66?
	
€ ((a77e7c793abc0d0c923a9afb275058e2fe57a198