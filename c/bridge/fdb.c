#include "fdb.h"

#include <stdlib.h>
#include <sys/random.h>

#include "clock.h"

#define MAC_MASK 0xffffffffffffull

enum {
	/* Stations that are looked at when one has to give way; the longest silent of them does. */
	LOOKED_AT = 16,
	/* A reader may be led astray by a change, and looks for one as often. */
	STEPS = 8,
	/* A frame that comes back does so sooner, by the whole seconds of this clock. */
	COMES_BACK_S = 2
};

static u64 key_of(u64 mac, u16 vlan)
{
	return mac | (u64)vlan << 48;
}

static u16 vlan_of(u64 key)
{
	return (u16)(key >> 48);
}

static bool aged(const struct fdb *f, const struct fdb_entry *e, u32 now)
{
	/* Signed: another worker's clock, read a moment later, may be a second ahead. */
	return f->ageing_s && vlan_of(e->key) != FDB_STATIC && (int32_t)(now - e->seen) > (int32_t)f->ageing_s;
}

static bool is_here(const struct fdb *f, u32 port)
{
	return __atomic_load_n(&f->here[port], __ATOMIC_RELAXED);
}

static bool expired(const struct fdb *f, const struct fdb_entry *e, u32 now)
{
	return aged(f, e, now) && !is_here(f, e->port);
}

static bool just_said(const struct fdb *f, const struct fdb_entry *e, u32 now)
{
	return is_here(f, e->port) && (int32_t)(now - e->seen) < COMES_BACK_S;
}

static u64 rotate(u64 x, u32 by)
{
	return x << by | x >> (64 - by);
}

static inline void sip_round(u64 v[4])
{
	v[0] += v[1];
	v[2] += v[3];
	v[1] = rotate(v[1], 13) ^ v[0];
	v[3] = rotate(v[3], 16) ^ v[2];
	v[0] = rotate(v[0], 32) + v[3];
	v[2] += v[1];
	v[1] = rotate(v[1], 17) ^ v[2];
	v[3] = rotate(v[3], 21) ^ v[0];
	v[2] = rotate(v[2], 32);
}

/* SipHash-1-3 of eight bytes: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012. */
static u32 hash(const struct fdb *f, u64 mac)
{
	const u64 length = 8ull << 56;
	u64 v[4] = {f->hash_key[0] ^ 0x736f6d6570736575ull, f->hash_key[1] ^ 0x646f72616e646f6dull,
		    f->hash_key[0] ^ 0x6c7967656e657261ull, f->hash_key[1] ^ 0x7465646279746573ull};

	v[3] ^= mac;
	sip_round(v);
	v[0] ^= mac;
	v[3] ^= length;
	sip_round(v);
	v[0] ^= length;
	v[2] ^= 0xff;
	sip_round(v);
	sip_round(v);
	sip_round(v);
	return (u32)(v[0] ^ v[1] ^ v[2] ^ v[3]);
}

static struct fdb_bucket *bucket_of(const struct fdb *f, u32 hashed, u16 vlan)
{
	return &f->buckets[(hashed + vlan * f->stride) & f->mask];
}

struct fdb *fdb_new(u32 ageing_s, u32 max_macs)
{
	struct fdb *f = calloc(1, sizeof(*f));
	u32 at = 1; /* 0 is none */

	if (!f)
		return NULL;
	f->ageing_s = ageing_s;
	f->max_macs = max_macs;
	for (u32 i = 0; i < FDB_POOLS; i++) {
		u32 size = i == FDB_GIVEN ? XN_MAX_GIVEN : i == FDB_STATIONS ? XN_MAX_STATIONS : max_macs;

		f->pools[i] = (struct fdb_pool){.first = at, .size = size};
		at += size;
	}
	for (f->mask = 1; f->mask < at; f->mask *= 2)
		;
	/* What is never used of it is never there: these are pages of zeroes. */
	f->buckets = calloc(f->mask--, sizeof(*f->buckets));
	f->entries = calloc(at, sizeof(*f->entries));
	if (!f->buckets || !f->entries) {
		fdb_free(f);
		return NULL;
	}
	if (getrandom(f->hash_key, sizeof(f->hash_key), 0) != sizeof(f->hash_key) ||
	    getrandom(&f->stride, sizeof(f->stride), 0) != sizeof(f->stride))
		f->hash_key[0] = f->stride = (u32)monotonic_ns();
	f->stride |= 1;
	return f;
}

void fdb_free(struct fdb *f)
{
	if (!f)
		return;
	free(f->buckets);
	free(f->entries);
	free(f);
}

/* ---- readers ---- */

/* A copy of the entry with this key, and its index; 0: there is none. */
static inline u32 find(const struct fdb *f, const struct fdb_bucket *b, u64 key, struct fdb_entry *copy)
{
	for (*copy = (struct fdb_entry){0};; relax()) {
		u32 seq = __atomic_load_n(&b->seq, __ATOMIC_ACQUIRE), steps = 0;
		u32 i = __atomic_load_n(&b->first, __ATOMIC_RELAXED);

		if (unlikely(seq & 1))
			continue;
		for (; i; i = __atomic_load_n(&f->entries[i].next, __ATOMIC_RELAXED)) {
			const struct fdb_entry *e = &f->entries[i];

			if (__atomic_load_n(&e->key, __ATOMIC_RELAXED) == key) {
				copy->key = key;
				copy->port = __atomic_load_n(&e->port, __ATOMIC_RELAXED);
				copy->seen = __atomic_load_n(&e->seen, __ATOMIC_RELAXED);
				break;
			}
			if (unlikely(++steps % STEPS == 0) && __atomic_load_n(&b->seq, __ATOMIC_RELAXED) != seq)
				break;
		}
		/* All of it was read before the number is looked at again. */
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (likely(__atomic_load_n(&b->seq, __ATOMIC_RELAXED) == seq))
			return i;
	}
}

/* A copy of the entry for an address, a static one for any VLAN, and its index; 0: there is none. */
static inline u32 find_address(const struct fdb *f, u64 mac, u16 vlan, struct fdb_entry *copy)
{
	u32 hashed = hash(f, mac);
	u32 i = find(f, bucket_of(f, hashed, FDB_STATIC), key_of(mac, FDB_STATIC), copy);

	return i ? i : find(f, bucket_of(f, hashed, vlan), key_of(mac, vlan), copy);
}

u32 fdb_lookup(const struct fdb *f, u64 mac, u16 vlan, u32 now)
{
	struct fdb_entry e;

	/* The key of a free entry, and nobody's address. */
	if (unlikely(!mac))
		return FDB_NONE;
	return find_address(f, mac, vlan, &e) && !expired(f, &e, now) ? e.port : FDB_NONE;
}

/* ---- writers, under the lock ---- */

static void begin_change(struct fdb_bucket *b)
{
	__atomic_store_n(&b->seq, b->seq + 1, __ATOMIC_RELAXED);
	/* Readers see the odd number before any changed word, and the even one after the last. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
}

static void end_change(struct fdb_bucket *b)
{
	__atomic_store_n(&b->seq, b->seq + 1, __ATOMIC_RELEASE);
}

static struct fdb_bucket *bucket_of_key(const struct fdb *f, u64 key)
{
	return bucket_of(f, hash(f, key & MAC_MASK), vlan_of(key));
}

static void set_next(struct fdb *f, u32 i, u32 next)
{
	__atomic_store_n(&f->entries[i].next, next, __ATOMIC_RELAXED);
}

static void insert(struct fdb *f, u32 i, u64 key, u32 port, u32 now)
{
	struct fdb_bucket *b = bucket_of_key(f, key);
	struct fdb_entry *e = &f->entries[i];

	begin_change(b);
	__atomic_store_n(&e->key, key, __ATOMIC_RELAXED);
	__atomic_store_n(&e->port, port, __ATOMIC_RELAXED);
	__atomic_store_n(&e->seen, now, __ATOMIC_RELAXED);
	set_next(f, i, b->first);
	__atomic_store_n(&b->first, i, __ATOMIC_RELAXED);
	end_change(b);
}

static struct fdb_pool *pool_of(struct fdb *f, u32 i)
{
	const u32 taught = f->pools[FDB_TAUGHT].first;

	if (i < taught)
		return &f->pools[FDB_GIVEN];
	if (i >= f->pools[FDB_STATIONS].first)
		return &f->pools[FDB_STATIONS];
	return &f->pools[FDB_TAUGHT + (i - taught) / f->max_macs];
}

static struct fdb_pool *pool_for(struct fdb *f, u32 port, enum fdb_teacher teacher)
{
	return &f->pools[teacher == FDB_GUEST ? FDB_TAUGHT + port : FDB_STATIONS];
}

static void discard(struct fdb *f, u32 i)
{
	struct fdb_entry *e = &f->entries[i];
	struct fdb_bucket *b = bucket_of_key(f, e->key);
	struct fdb_pool *pool = pool_of(f, i);
	u32 before = 0, at = b->first;

	for (; at != i; at = f->entries[at].next)
		before = at;
	begin_change(b);
	if (before)
		set_next(f, before, e->next);
	else
		__atomic_store_n(&b->first, e->next, __ATOMIC_RELAXED);
	__atomic_store_n(&e->key, 0, __ATOMIC_RELAXED);
	set_next(f, i, pool->free);
	end_change(b);
	pool->free = i;
}

static void move(struct fdb *f, u32 i, u32 port, u32 now)
{
	struct fdb_entry *e = &f->entries[i];
	struct fdb_bucket *b = bucket_of_key(f, e->key);

	begin_change(b);
	__atomic_store_n(&e->port, port, __ATOMIC_RELAXED);
	__atomic_store_n(&e->seen, now, __ATOMIC_RELAXED);
	end_change(b);
}

/* Takes an entry that is free; 0: there is none. */
static u32 take(struct fdb *f, struct fdb_pool *pool)
{
	u32 i = pool->free;

	if (i) {
		pool->free = f->entries[i].next;
	} else if (pool->used < pool->size) {
		i = pool->first + pool->used;
		__atomic_store_n(&pool->used, pool->used + 1, __ATOMIC_RELAXED);
	}
	return i;
}

/* The longest silent of the next `most` entries of a pool that is full. */
static u32 oldest(struct fdb *f, struct fdb_pool *pool, u32 most)
{
	u32 best = 0;

	for (u32 n = min_u32(most, pool->size); n; n--) {
		u32 i = pool->first + pool->hand;

		pool->hand = (pool->hand + 1) % pool->size;
		if (!best || (int32_t)(f->entries[best].seen - f->entries[i].seen) > 0)
			best = i;
	}
	return best;
}

/* Room for one more; 0: there is none. Of a guest's share only what has aged gives way, of the wire whatever is older. */
static u32 make_room(struct fdb *f, u32 port, enum fdb_teacher teacher, u32 now)
{
	const bool limited = teacher == FDB_GUEST;
	struct fdb_pool *pool = pool_for(f, port, teacher);
	u32 i = take(f, pool);

	if (i)
		return i;
	/* To look through a share takes a while: once a second. */
	if (limited && f->full[port] == now)
		return 0;
	i = oldest(f, pool, limited ? pool->size : LOOKED_AT);
	if (limited && !aged(f, &f->entries[i], now)) {
		f->full[port] = now;
		return 0;
	}
	discard(f, i);
	return take(f, pool);
}

enum fdb_verdict fdb_learn(struct fdb *f, u64 mac, u16 vlan, u32 port, enum fdb_teacher teacher, u32 now)
{
	const bool limited = teacher == FDB_GUEST;
	enum fdb_verdict verdict = FDB_FULL;
	struct fdb_entry e;
	u32 i = find_address(f, mac, vlan, &e);

	if (likely(i && e.port == port && !expired(f, &e, now))) {
		/* Once a second, and unlocked: at worst another one that has come into its place lives a little longer. */
		if (e.seen != now)
			__atomic_store_n(&f->entries[i].seen, now, __ATOMIC_RELAXED);
		return FDB_KNOWN;
	}
	if (i && vlan_of(e.key) == FDB_STATIC)
		return teacher == FDB_WIRE_GROUP && is_here(f, e.port) ? FDB_REFLECTED : FDB_FOREIGN;
	if (i && teacher == FDB_WIRE_GROUP && just_said(f, &e, now))
		return FDB_KNOWN;
	spin_lock(&f->lock);
	i = find_address(f, mac, vlan, &e);
	if (i && vlan_of(e.key) == FDB_STATIC) {
		verdict = FDB_FOREIGN;
	} else if (i && teacher == FDB_WIRE_GROUP && just_said(f, &e, now)) {
		verdict = FDB_KNOWN;
	} else if (i && pool_of(f, i) == pool_for(f, port, teacher)) {
		verdict = limited ? FDB_LEARNED : FDB_KNOWN;
		move(f, i, port, now);
	} else {
		u32 room = make_room(f, port, teacher, now);

		if (room) {
			bool was_a_guests = i && pool_of(f, i) != &f->pools[FDB_STATIONS];

			verdict = was_a_guests ? FDB_LEARNED : limited ? FDB_NEW : FDB_KNOWN;
			/* The new one first, where it is found first: meanwhile the address is not unknown. */
			insert(f, room, key_of(mac, vlan), port, now);
			if (i)
				discard(f, i);
		}
	}
	spin_unlock(&f->lock);
	return verdict;
}

int fdb_set_static(struct fdb *f, u64 mac, u32 port)
{
	struct fdb_entry e;
	int r = 0;

	spin_lock(&f->lock);
	u32 i = find_address(f, mac, FDB_STATIC, &e);

	if (i) {
		r = e.port == port ? 0 : -EEXIST;
		goto out;
	}
	i = take(f, &f->pools[FDB_GIVEN]);
	if (!i) {
		r = -ENOSPC;
		goto out;
	}
	insert(f, i, key_of(mac, FDB_STATIC), port, 0);
	/* What was learned of the address, on whatever VLAN, gives way. */
	for (const struct fdb_pool *pool = &f->pools[FDB_TAUGHT]; pool < &f->pools[FDB_POOLS]; pool++)
		for (i = pool->first; i < pool->first + pool->used; i++)
			if ((f->entries[i].key & MAC_MASK) == mac)
				discard(f, i);
out:
	spin_unlock(&f->lock);
	return r;
}

bool fdb_clear_static(struct fdb *f, u64 mac, u32 port)
{
	struct fdb_entry e;

	spin_lock(&f->lock);
	u32 i = mac ? find_address(f, mac, FDB_STATIC, &e) : 0;
	bool found = i && e.port == port;

	if (found)
		discard(f, i);
	spin_unlock(&f->lock);
	return found;
}

void fdb_set_here(struct fdb *f, u32 port, bool here, u32 now)
{
	const struct fdb_pool *pool = &f->pools[FDB_TAUGHT + port];

	for (u32 i = pool->first; f->here[port] && !here && i < pool->first + pool->used; i++)
		__atomic_store_n(&f->entries[i].seen, now, __ATOMIC_RELAXED);
	__atomic_store_n(&f->here[port], here, __ATOMIC_RELAXED);
}

void fdb_flush(struct fdb *f, u32 port, bool all)
{
	spin_lock(&f->lock);
	for (u32 n = all ? FDB_GIVEN : FDB_TAUGHT; n < FDB_POOLS; n++) {
		const struct fdb_pool *pool = &f->pools[n];

		for (u32 i = pool->first; i < pool->first + pool->used; i++)
			if (f->entries[i].key && f->entries[i].port == port)
				discard(f, i);
	}
	spin_unlock(&f->lock);
}

static void forget_expired(struct fdb *f, u32 i, u32 now)
{
	spin_lock(&f->lock);
	if (f->entries[i].key && expired(f, &f->entries[i], now))
		discard(f, i);
	spin_unlock(&f->lock);
}

u32 fdb_dump(struct fdb *f, struct xn_fdb_entry *out, u32 max, u32 stations, u32 now)
{
	u32 n = 0;

	/* As a reader: no worker that learns waits for it. */
	for (u32 p = 0; p < FDB_POOLS; p++) {
		const struct fdb_pool *pool = &f->pools[p];
		u32 most = p == FDB_STATIONS && stations < max - n ? n + stations : max;
		u32 end = pool->first + __atomic_load_n(&pool->used, __ATOMIC_RELAXED);

		for (u32 i = pool->first; i < end && n < most; i++) {
			u64 key = __atomic_load_n(&f->entries[i].key, __ATOMIC_RELAXED);
			struct fdb_entry e;

			if (!key || find(f, bucket_of_key(f, key), key, &e) != i)
				continue;
			if (expired(f, &e, now)) {
				forget_expired(f, i, now);
				continue;
			}
			bool fixed = p == FDB_GIVEN;

			memcpy(out[n].mac, &key, sizeof(out[n].mac));
			out[n].vlan = vlan_of(key);
			out[n].port = e.port;
			out[n].is_static = fixed;
			out[n].age_s = fixed ? 0 : now - e.seen;
			n++;
		}
	}
	return n;
}

void fdb_count(const struct fdb *f, u32 given[XN_MAX_PORTS], u32 learned[XN_MAX_PORTS], u32 now)
{
	memset(given, 0, XN_MAX_PORTS * sizeof(*given));
	memset(learned, 0, XN_MAX_PORTS * sizeof(*learned));
	for (u32 p = 0; p < FDB_POOLS; p++) {
		const struct fdb_pool *pool = &f->pools[p];
		u32 end = pool->first + __atomic_load_n(&pool->used, __ATOMIC_RELAXED);

		for (u32 i = pool->first; i < end; i++) {
			/* One that is just changing may count as it was or as it will be. */
			struct fdb_entry e = {.key = __atomic_load_n(&f->entries[i].key, __ATOMIC_RELAXED),
					      .port = __atomic_load_n(&f->entries[i].port, __ATOMIC_RELAXED),
					      .seen = __atomic_load_n(&f->entries[i].seen, __ATOMIC_RELAXED)};

			if (e.key && !expired(f, &e, now))
				(p == FDB_GIVEN ? given : learned)[e.port]++;
		}
	}
}
