"""`kvstore demo-vllm`: prefill and decode apart against one server that does both.

load       what is sent, and when
client     sends it and notes when each token came; knows no processes
servers    the processes: vLLM servers and the proxy
run        the three set-ups, one after the other
report     what they did, as a table or as JSON
command    the command line
"""
