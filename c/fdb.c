#include "fdb.h"

#include <stdlib.h>
#include <sys/random.h>

#include "clock.h"

#define MAC_MASK 0xffffffffffffull

static u64 key_of(u64 mac, u16 vlan)
{
	return mac | (u64)vlan << 48;
}

static bool is_static(const struct fdb_entry *e)
{
	return e->key >> 48 == FDB_STATIC;
}

static bool expired(const struct fdb *f, const struct fdb_entry *e, u32 now)
{
	/* Signed: another worker's clock, read a moment later, may be a second ahead. */
	return f->ageing_s && !is_static(e) && (int32_t)(now - e->seen) > (int32_t)f->ageing_s;
}

static u32 slot_of(const struct fdb *f, u64 mac)
{
	return (u32)(((mac ^ f->seed) * 0x9e3779b97f4a7c15ull) >> 52) & (FDB_BUCKETS - 1);
}

struct fdb *fdb_new(u32 ageing_s, u32 max_macs)
{
	struct fdb *f = aligned_alloc(XN_CACHELINE, sizeof(*f));

	if (!f)
		return NULL;
	memset(f, 0, sizeof(*f));
	f->ageing_s = ageing_s;
	f->max_macs = max_macs;
	if (getrandom(&f->seed, sizeof(f->seed), 0) != sizeof(f->seed))
		f->seed = monotonic_ns();
	return f;
}

/* A whole copy of a bucket; retries while a writer is in it. */
static void read_bucket(const struct fdb_bucket *b, struct fdb_entry *copy)
{
	for (;;) {
		u32 seq = __atomic_load_n(&b->seq, __ATOMIC_ACQUIRE);

		if (likely(!(seq & 1))) {
			for (u32 i = 0; i < FDB_WAYS; i++) {
				copy[i].key = __atomic_load_n(&b->entry[i].key, __ATOMIC_RELAXED);
				copy[i].port = __atomic_load_n(&b->entry[i].port, __ATOMIC_RELAXED);
				copy[i].seen = __atomic_load_n(&b->entry[i].seen, __ATOMIC_RELAXED);
			}
			/* The copies are read before the number is looked at again. */
			__atomic_thread_fence(__ATOMIC_ACQUIRE);
			if (likely(__atomic_load_n(&b->seq, __ATOMIC_RELAXED) == seq))
				return;
		}
		relax();
	}
}

/* Index of the entry for (mac, vlan), a static one for any VLAN; FDB_WAYS if there is none. */
static u32 find(const struct fdb_entry *e, u64 mac, u16 vlan)
{
	for (u32 i = 0; i < FDB_WAYS; i++)
		if (e[i].key == key_of(mac, vlan) || e[i].key == key_of(mac, FDB_STATIC))
			return i;
	return FDB_WAYS;
}

u32 fdb_lookup(const struct fdb *f, u64 mac, u16 vlan, u32 now)
{
	struct fdb_entry e[FDB_WAYS];

	/* The key of a free entry, and nobody's address. */
	if (unlikely(!mac))
		return FDB_NONE;
	read_bucket(&f->bucket[slot_of(f, mac)], e);
	u32 i = find(e, mac, vlan);

	return i == FDB_WAYS || expired(f, &e[i], now) ? FDB_NONE : e[i].port;
}

/* Under the lock: puts `e` into way i of the bucket. */
static void write_entry(struct fdb *f, struct fdb_bucket *b, u32 i, struct fdb_entry e)
{
	struct fdb_entry *old = &b->entry[i];

	if (old->key && !is_static(old))
		f->learned[old->port]--;
	if (e.key && !is_static(&e))
		f->learned[e.port]++;
	__atomic_store_n(&b->seq, b->seq + 1, __ATOMIC_RELAXED);
	/* Readers see the odd number before any changed word, and the even one after the last. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
	__atomic_store_n(&old->key, e.key, __ATOMIC_RELAXED);
	__atomic_store_n(&old->port, e.port, __ATOMIC_RELAXED);
	__atomic_store_n(&old->seen, e.seen, __ATOMIC_RELAXED);
	__atomic_store_n(&b->seq, b->seq + 1, __ATOMIC_RELEASE);
}

/* The way for a new entry: a free or expired one, else the oldest learned; FDB_WAYS if all are static. */
static u32 victim(const struct fdb *f, const struct fdb_bucket *b, u32 now)
{
	u32 best = FDB_WAYS;

	for (u32 i = 0; i < FDB_WAYS; i++) {
		const struct fdb_entry *e = &b->entry[i];

		if (!e->key || expired(f, e, now))
			return i;
		if (!is_static(e) && (best == FDB_WAYS || (int32_t)(b->entry[best].seen - e->seen) > 0))
			best = i;
	}
	return best;
}

/* Under the lock: removes expired entries, at most once a second; addresses that are gone are no part of a share. */
static void sweep(struct fdb *f, u32 now)
{
	if (f->swept == now)
		return;
	f->swept = now;
	for (u32 slot = 0; slot < FDB_BUCKETS; slot++)
		for (u32 i = 0; i < FDB_WAYS; i++) {
			const struct fdb_entry *e = &f->bucket[slot].entry[i];

			if (e->key && expired(f, e, now))
				write_entry(f, &f->bucket[slot], i, (struct fdb_entry){0});
		}
}

enum fdb_verdict fdb_learn(struct fdb *f, u64 mac, u16 vlan, u32 port, bool limited, u32 now)
{
	struct fdb_bucket *b = &f->bucket[slot_of(f, mac)];
	struct fdb_entry e[FDB_WAYS];

	read_bucket(b, e);
	u32 i = find(e, mac, vlan);

	if (likely(i < FDB_WAYS && e[i].port == port && !expired(f, &e[i], now))) {
		/* Once a second, and unlocked: at worst another entry of the bucket lives a little longer. */
		if (e[i].seen != now)
			__atomic_store_n(&b->entry[i].seen, now, __ATOMIC_RELAXED);
		return FDB_KNOWN;
	}
	if (i < FDB_WAYS && is_static(&e[i]))
		return FDB_FOREIGN;

	enum fdb_verdict verdict = FDB_FULL;

	spin_lock(&f->lock);
	if (limited && f->learned[port] >= f->max_macs)
		sweep(f, now);
	i = find(b->entry, mac, vlan);
	if (i < FDB_WAYS && is_static(&b->entry[i])) {
		verdict = FDB_FOREIGN;
	} else if (!limited || f->learned[port] < f->max_macs || (i < FDB_WAYS && b->entry[i].port == port)) {
		if (i == FDB_WAYS)
			i = victim(f, b, now);
		if (i < FDB_WAYS) {
			verdict = limited || (b->entry[i].key && b->entry[i].port != port) ? FDB_LEARNED : FDB_KNOWN;
			write_entry(f, b, i, (struct fdb_entry){key_of(mac, vlan), port, now});
		}
	}
	spin_unlock(&f->lock);
	return verdict;
}

int fdb_set_static(struct fdb *f, u64 mac, u32 port)
{
	struct fdb_bucket *b = &f->bucket[slot_of(f, mac)];
	int r = 0;

	spin_lock(&f->lock);
	for (u32 i = 0; i < FDB_WAYS; i++) {
		if ((b->entry[i].key & MAC_MASK) != mac)
			continue;
		if (is_static(&b->entry[i]) && b->entry[i].port != port) {
			r = -EEXIST;
			goto out;
		}
		/* What was learned of the address, on whatever VLAN, gives way. */
		write_entry(f, b, i, (struct fdb_entry){0});
	}
	u32 way = victim(f, b, 0);

	if (way == FDB_WAYS)
		r = -ENOSPC;
	else
		write_entry(f, b, way, (struct fdb_entry){key_of(mac, FDB_STATIC), port, 0});
out:
	spin_unlock(&f->lock);
	return r;
}

bool fdb_clear_static(struct fdb *f, u64 mac, u32 port)
{
	struct fdb_bucket *b = &f->bucket[slot_of(f, mac)];
	bool found = false;

	spin_lock(&f->lock);
	for (u32 i = 0; i < FDB_WAYS && !found; i++) {
		found = b->entry[i].key == key_of(mac, FDB_STATIC) && b->entry[i].port == port;
		if (found)
			write_entry(f, b, i, (struct fdb_entry){0});
	}
	spin_unlock(&f->lock);
	return found;
}

void fdb_flush(struct fdb *f, u32 port, bool all)
{
	spin_lock(&f->lock);
	for (u32 slot = 0; slot < FDB_BUCKETS; slot++)
		for (u32 i = 0; i < FDB_WAYS; i++) {
			const struct fdb_entry *e = &f->bucket[slot].entry[i];

			if (e->key && e->port == port && (all || !is_static(e)))
				write_entry(f, &f->bucket[slot], i, (struct fdb_entry){0});
		}
	spin_unlock(&f->lock);
}

static void forget_expired(struct fdb *f, struct fdb_bucket *b, u32 i, u32 now)
{
	spin_lock(&f->lock);
	if (b->entry[i].key && expired(f, &b->entry[i], now))
		write_entry(f, b, i, (struct fdb_entry){0});
	spin_unlock(&f->lock);
}

u32 fdb_dump(struct fdb *f, struct xn_fdb_entry *out, u32 max, u32 now)
{
	u32 n = 0;

	/* As a reader: no worker that learns waits for it. */
	for (u32 slot = 0; slot < FDB_BUCKETS; slot++) {
		struct fdb_entry copy[FDB_WAYS];

		read_bucket(&f->bucket[slot], copy);
		for (u32 i = 0; i < FDB_WAYS; i++) {
			const struct fdb_entry *e = &copy[i];

			if (!e->key)
				continue;
			if (expired(f, e, now)) {
				forget_expired(f, &f->bucket[slot], i, now);
				continue;
			}
			if (n == max)
				continue;
			bool fixed = is_static(e);

			memcpy(out[n].mac, &e->key, sizeof(out[n].mac));
			out[n].vlan = fixed ? 0xffff : (u16)(e->key >> 48);
			out[n].port = e->port;
			out[n].is_static = fixed;
			out[n].age_s = fixed ? 0 : now - e->seen;
			n++;
		}
	}
	return n;
}
