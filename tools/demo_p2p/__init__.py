"""`kvstore demo-p2p`: prefill servers hand KV to decode servers directly, by each transport in turn.

run        one server alone, then two and two behind the proxy
report     what each transport did, as a table or as JSON
command    the command line
"""
