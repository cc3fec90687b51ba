"""The mesh, partition specs, collectives and the pipeline. Generic: nothing here is about Llama."""
