/* Checksums that a frame from the wire may lack: which they are shows in the frame alone. */
#ifndef XN_PARTIAL_H
#define XN_PARTIAL_H

#include "view.h"

/*
 * Looks at a frame from the wire, in memory of ours, in one piece or the first with all headers: a virtual interface may
 * have left its checksum partial. Then v needs it. In tunnels it is the innermost: the kernel has made those around it
 * as if that were complete. Any other that cannot wait, one that is partial as well or SCTP's, is completed.
 */
void partial_find(struct view *v);

#endif
