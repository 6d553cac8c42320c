"""What pipes send over sockets, and how their ends find each other; each transport uses what it needs of it.

frame        a header, then the bytes of what it describes
hello        what an end says of itself before it is joined
slots        rows of memory, as they are sent
stream       a socket with deadlines
rendezvous   listening, connecting, and telling the peer from strangers
"""
