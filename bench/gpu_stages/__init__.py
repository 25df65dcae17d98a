"""The stages of `bench/gpu.py`: what is run on a GPU, case by case, each in a process of its own.

The process that runs the cases imports the standard library alone, so that nothing that is broken on a machine can
take the report with it. Modules named after a stage list its cases without importing torch; their functions run in
`worker`.
"""
