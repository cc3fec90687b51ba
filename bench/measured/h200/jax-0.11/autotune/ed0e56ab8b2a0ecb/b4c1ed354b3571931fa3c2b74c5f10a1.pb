
J
4
ed0e56ab8b2a0ecb b4c1ed354b3571931fa3c2b74c5f10a1
fe9062d0fff82a66>
	
 ((a77e7c793abc0d0c923a9afb275058e2fe57a198