"""What the evidence says of one image or container, and how far its silence can be believed.

subject    what is asked for → the bytes to look for
scan       chunk files → lines of the subject, streaming
sightings  lines → what was done, counted, in bounded memory (pure)
watch      ledgers → when and how the node watched, and what was lost (pure)
answer     the two together; rendering shows it to people
"""
