
J
4
ed0e56ab8b2a0ecb 0a03ebafbb98ae44bc0566a2d4799f65
fe9062d0fff82a66>
	
   ((a77e7c793abc0d0c923a9afb275058e2fe57a198