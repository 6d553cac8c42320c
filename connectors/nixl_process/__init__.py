"""NIXL's transport process, which runs beside this one.

life        when it starts and ends; this process's side
client      a pipe's handle on its agent there; this process's side
messages    what the two say to each other
agent       NIXL's own interface; imported only there
__main__    the process
"""
