"""The files that processes run: which of their functions get probes, and how these come and go.

question  what is asked of a file, and the answer                                             (pure)
elf       the functions of an ELF file; in the child process alone
child     the process that reads strangers' files
reader    starts it, asks it
mapped    which files processes have mapped
notices   the kernel's word that a process has begun to run a file
attaching one file's probes
watch     all of them
"""
