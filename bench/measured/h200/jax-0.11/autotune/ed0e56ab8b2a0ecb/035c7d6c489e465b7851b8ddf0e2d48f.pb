
J
4
ed0e56ab8b2a0ecb 035c7d6c489e465b7851b8ddf0e2d48f
fe9062d0fff82a66=
	
 ((a77e7c793abc0d0c923a9afb275058e2fe57a198