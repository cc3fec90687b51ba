
J
4
ed0e56ab8b2a0ecb b2d51f40ae36b48db4832b51ffbef489
fe9062d0fff82a66=
	
 ((a77e7c793abc0d0c923a9afb275058e2fe57a198