/*
 * Forwarding database: (MAC, VLAN) -> port.
 *
 * Buckets of one cache line, hashed by MAC with a secret seed, so that all VLANs of a MAC share a bucket and a static
 * entry, which holds for every VLAN, is found by the same look. Readers take no lock (a sequence number per bucket tells
 * of a change); whoever inserts or removes holds the one lock. A full bucket gives up its oldest learned entry.
 * A MAC is the number whose lowest byte is the first on the wire, as view_src gives it.
 */
#ifndef XN_FDB_H
#define XN_FDB_H

#include "base.h"

enum { FDB_BUCKETS = 4096, FDB_WAYS = 3, FDB_NONE = XN_MAX_PORTS };
/* A VLAN id that no frame can have (4095 is reserved, and yet frames carry it): the entry is static, for all VLANs. */
enum { FDB_STATIC = 0xffff };

struct fdb_entry {
	u64 key; /* MAC | VLAN << 48; 0: free */
	u32 port;
	u32 seen; /* seconds of the monotonic clock */
};

struct fdb_bucket {
	u32 seq; /* odd while it changes */
	u32 pad;
	struct fdb_entry entry[FDB_WAYS];
	u64 pad2;
} XN_ALIGNED;

struct fdb {
	struct spinlock lock;
	u64 seed;
	u32 ageing_s; /* 0: for ever */
	u32 max_macs; /* that one port may teach */
	u32 learned[XN_MAX_PORTS];
	u32 swept; /* when expired entries were last removed for a port that had taught its share */
	struct fdb_bucket bucket[FDB_BUCKETS];
};

enum fdb_verdict {
	FDB_KNOWN,   /* nothing to learn, or nothing that changes which addresses are of which guest */
	FDB_LEARNED, /* new or moved, to a guest or in place of what another port had taught */
	FDB_FOREIGN, /* the address is another port's own */
	FDB_FULL     /* not learned: the port has taught its share, or only static entries could give way */
};

struct fdb *fdb_new(u32 ageing_s, u32 max_macs);
/* The port of a destination; FDB_NONE if it is unknown. */
u32 fdb_lookup(const struct fdb *f, u64 mac, u16 vlan, u32 now);
/* limited: the port is a guest's, which has its share and no more. */
enum fdb_verdict fdb_learn(struct fdb *f, u64 mac, u16 vlan, u32 port, bool limited, u32 now);
/* A port may have several. -EEXIST: another port has it; -ENOSPC: its bucket is full of static ones. */
int fdb_set_static(struct fdb *f, u64 mac, u32 port);
/* False: the port has no such. */
bool fdb_clear_static(struct fdb *f, u64 mac, u32 port);
/* Removes what a port taught, and its static addresses too if `all`. */
void fdb_flush(struct fdb *f, u32 port, bool all);
/* Removes expired entries, copies up to max live ones; their number, and whether any expired. */
u32 fdb_dump(struct fdb *f, struct xn_fdb_entry *out, u32 max, u32 now);

#endif
