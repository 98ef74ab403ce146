/*
 * Whose IP addresses a guest may speak for: the ones that it was given, wherever others would believe what it says: in ARP,
 * in neighbour discovery, as the source of its packets, and where they ask for one of their own. It speaks IP only, behind
 * at most the tags that packet.h looks behind: in what is not understood anything may be.
 */
#ifndef XN_GUARD_H
#define XN_GUARD_H

#include "view.h"

struct guard {
	u32 n; /* 0: any */
	struct xn_ip ips[XN_MAX_IPS];
};

/*
 * Of a frame whose first `have` bytes, all of its headers if it has any, are a snapshot at p that is sent in their place.
 * *claimed: the address that it speaks for; of version 0: none that we understand.
 */
bool guard_allows(const struct guard *g, const struct view *v, const u8 *p, u32 have, struct xn_ip *claimed);

#endif
