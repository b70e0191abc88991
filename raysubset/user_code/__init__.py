"""The user's own code: functions that a config names as package.module:function, and objects given in place of names.

load_function("model.name", "network:make")      # functions: import or call it, with errors in a line
code_fingerprint("network:make")                 # source_files: its module's files and those of its imports
with holding(Given({"given:Net": Net})): ...     # given: objects that configs of this process name
object_fingerprint("given:Net", Net)             # object_digests: the code and values of such an object
"""
