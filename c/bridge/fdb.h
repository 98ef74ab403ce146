/*
 * Forwarding database: (MAC, VLAN) -> port.
 *
 * A hash table with chains, of as many buckets as there may be entries: whatever it holds, nothing gives way for want of
 * room where it hashes to. The hash has a secret key, so nobody can choose addresses that share a bucket; the VLANs of a
 * MAC lie apart by a secret stride. A static entry holds for every VLAN and is looked for first. Readers take no lock (a
 * sequence number per bucket tells of a change); whoever inserts or removes holds the one lock.
 *
 * Room is apart: for given addresses, for what each guest may teach, and for the stations of the wire, of which an old one
 * gives way to a new one. So neither the wire nor another guest pushes a guest's address out.
 *
 * What a guest has taught does not age while it is here: a silent server is still to be reached. It gives way when its share
 * is full, and when another port has a frame from there; but a frame to all that comes from the wire right after the guest
 * has sent one may be its own, come back.
 * A MAC is the number whose lowest byte is the first on the wire, as view_src gives it.
 */
#ifndef XN_FDB_H
#define XN_FDB_H

#include "base.h"

enum { FDB_NONE = XN_MAX_PORTS };
/* A VLAN id that no frame can have (4095 is reserved, and yet frames carry it): the entry is static, for all VLANs. */
enum { FDB_STATIC = XN_ANY_VLAN };

struct fdb_entry {
	u64 key; /* MAC | VLAN << 48; 0: free */
	u32 port;
	u32 seen; /* seconds of the monotonic clock */
	u32 next; /* in its bucket, or of those that are free; 0: none */
	u32 pad;
};

struct fdb_bucket {
	u32 seq; /* odd while it changes */
	u32 first;
};

/* Of given addresses; of what each port's guest has taught; of the wire's stations. */
enum { FDB_GIVEN, FDB_TAUGHT, FDB_STATIONS = FDB_TAUGHT + XN_MAX_PORTS, FDB_POOLS };

struct fdb_pool {
	u32 first, size;
	u32 used; /* of them, from the first, that ever were */
	u32 free; /* the first of those that are free again; 0: none */
	u32 hand; /* where the next is looked for that may give way */
};

struct fdb {
	struct spinlock lock;
	u64 hash_key[2];
	u32 stride;   /* odd */
	u32 mask;     /* of buckets */
	u32 ageing_s; /* 0: for ever */
	u32 max_macs; /* that one guest may teach */
	struct fdb_bucket *buckets;
	struct fdb_entry *entries;
	struct fdb_pool pools[FDB_POOLS];
	bool here[XN_MAX_PORTS]; /* a guest that takes frames; changed while parked */
	u32 full[XN_MAX_PORTS];	 /* the second in which nothing of a guest's share could give way */
};

enum fdb_verdict {
	FDB_KNOWN,     /* nothing to learn, or nothing that changes which addresses are of which guest */
	FDB_LEARNED,   /* moved from one guest to another, or to the wire; or a guest's again that had aged */
	FDB_NEW,       /* a guest's, and was none's before */
	FDB_FOREIGN,   /* the address is another port's own */
	FDB_REFLECTED, /* the own address of a guest that is here, in a frame to many that comes from the wire */
	FDB_FULL       /* not learned: the guest has taught its share */
};

enum fdb_teacher {
	FDB_GUEST,     /* which has its share and no more */
	FDB_WIRE,      /* by a frame to one station */
	FDB_WIRE_GROUP /* by a frame to many */
};

struct fdb *fdb_new(u32 ageing_s, u32 max_macs);
void fdb_free(struct fdb *f);
/* The port of a destination; FDB_NONE if it is unknown. */
u32 fdb_lookup(const struct fdb *f, u64 mac, u16 vlan, u32 now);
enum fdb_verdict fdb_learn(struct fdb *f, u64 mac, u16 vlan, u32 port, enum fdb_teacher teacher, u32 now);
/* A port may have several. -EEXIST: another port has it; -ENOSPC: XN_MAX_GIVEN are given already. */
int fdb_set_static(struct fdb *f, u64 mac, u32 port);
/* False: the port has no such. */
bool fdb_clear_static(struct fdb *f, u64 mac, u32 port);
/* While parked: whether the port's guest takes frames. What it has taught ages from when it does no more. */
void fdb_set_here(struct fdb *f, u32 port, bool here, u32 now);
/* Removes what a port taught, and its static addresses too if `all`. */
void fdb_flush(struct fdb *f, u32 port, bool all);
/* Copies up to max live entries, at most `stations` of them of the wire; their number. Removes expired ones that it meets. */
u32 fdb_dump(struct fdb *f, struct xn_fdb_entry *out, u32 max, u32 stations, u32 now);
/* The live entries of each port. */
void fdb_count(const struct fdb *f, u32 given[XN_MAX_PORTS], u32 learned[XN_MAX_PORTS], u32 now);

#endif
