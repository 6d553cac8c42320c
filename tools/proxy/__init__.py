"""`kvstore proxy`: one address in front of servers that prefill and servers that decode.

    settings   what can be set, checked when made
    messages   what is read out of requests and written into them; knows no network
    servers    which servers there are, how they do, and which is next
    relay      a request's way: prefill, then decode, then back to the client
    command    the command line
    app        the HTTP server: bounds, paths, start and stop

It passes on what servers say and never computes, stores or changes an answer.
"""
