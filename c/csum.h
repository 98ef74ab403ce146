/*
 * Internet checksums (RFC 1071).
 *
 * A frame from a virtual interface may carry a partial checksum: the sender's kernel left it to a device that does not
 * exist, and the field holds the folded sum of the pseudo header alone (include/linux/skbuff.h, CHECKSUM_PARTIAL).
 */
#ifndef XN_CSUM_H
#define XN_CSUM_H

#include "base.h"

/* Completes the partial TCP and UDP checksums of a frame, in place, also inside VXLAN; true if there was one. */
bool csum_complete_partial(u8 *frame, u32 len);

#endif
