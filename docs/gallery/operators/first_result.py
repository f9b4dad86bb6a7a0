"""
First result
============

"""

import dcn_np

print(dcn_np.isa())
