/*
 * The forwarding database alone: more stations of the wire than it holds, and readers beside a writer.
 *
 * addresses flood: prints what is known of each kind after that, and the longest chain. fdb race SECONDS: lookups of addresses
 * that stay, beside others that come, move and go; prints how many there were, and how many were wrong.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "bridge/fdb.c"

enum { GUESTS = 4, MACS = 64, VLANS = 16, WIRE = 100, OTHER = 101, STAYS = 64, READERS = 2 };

static u64 station(u32 number)
{
	return (u64)number << 16 | 2;
}

/* The address of a guest, the VLAN of which is number % VLANS. */
static u64 taught(u32 guest, u32 number)
{
	return (u64)(guest << 16 | number / VLANS) << 16 | 0x5452;
}

static u32 longest_chain(const struct fdb *f)
{
	u32 longest = 0;

	for (u32 b = 0; b <= f->mask; b++) {
		u32 n = 0;

		for (u32 i = f->buckets[b].first; i; i = f->entries[i].next)
			n++;
		longest = n > longest ? n : longest;
	}
	return longest;
}

static int flood(void)
{
	struct fdb *f = fdb_new(300, MACS);
	u32 guests = 0, given = 0, stations = 0, old = 0, sum = 0, now = 1000;
	u32 counts[2][XN_MAX_PORTS];
	const u32 many = 4 * XN_MAX_STATIONS;

	for (u32 guest = 0; guest < GUESTS; guest++) {
		if (fdb_set_static(f, taught(GUESTS + guest, 0), guest))
			return 1;
		for (u32 i = 0; i < MACS; i++)
			if (fdb_learn(f, taught(guest, i), i % VLANS, guest, FDB_GUEST, now) != FDB_NEW)
				return 1;
	}
	/* A thousand a second, on two interfaces. */
	for (u32 i = 0; i < many; i++)
		if (fdb_learn(f, station(i), i % 4096, WIRE + i % 2, FDB_WIRE, now + i / 1000) != FDB_KNOWN)
			return 1;
	now += many / 1000;
	for (u32 guest = 0; guest < GUESTS; guest++) {
		for (u32 vlan = 0; vlan < 4096; vlan++)
			given += fdb_lookup(f, taught(GUESTS + guest, 0), (u16)vlan, now) == guest;
		for (u32 i = 0; i < MACS; i++)
			guests += fdb_lookup(f, taught(guest, i), i % VLANS, now) == guest;
	}
	for (u32 i = many - XN_MAX_STATIONS; i < many; i++)
		stations += fdb_lookup(f, station(i), i % 4096, now) == WIRE + i % 2;
	for (u32 i = 0; i < many - 2 * XN_MAX_STATIONS; i++)
		old += fdb_lookup(f, station(i), i % 4096, now) != FDB_NONE;
	fdb_count(f, counts[0], counts[1], now);
	for (u32 port = WIRE; port <= OTHER; port++)
		sum += counts[1][port];
	printf("%u %u %u %u %u %u\n", guests, given, stations, old, sum, longest_chain(f));
	fdb_free(f);
	return 0;
}

struct race {
	struct fdb *f;
	bool over;
};

static void *read_all(void *argument)
{
	struct race *r = argument;
	u64 lookups = 0, *wrong = calloc(1, sizeof(*wrong));

	for (; !__atomic_load_n(&r->over, __ATOMIC_RELAXED); lookups += STAYS)
		for (u32 i = 0; i < STAYS; i++) {
			u32 port = fdb_lookup(r->f, station(i), (u16)i, 0);

			/* Every other one moves from port to port, and is known all the time. */
			*wrong += i % 2 ? port != WIRE : port > GUESTS && port != WIRE && port != OTHER;
		}
	*wrong += lookups ? 0 : 1;
	return wrong;
}

static int race(double seconds)
{
	struct race r = {.f = fdb_new(0, XN_MAX_MACS)};
	pthread_t readers[READERS];
	struct timespec start, now;
	u64 changes = 0, wrong = 0;

	/* Few buckets, so that what comes and goes is in the chains of what stays. */
	r.f->mask = 15;
	for (u32 i = 0; i < STAYS; i++)
		(void)fdb_learn(r.f, station(i), (u16)i, WIRE, FDB_WIRE, 0);
	for (u32 i = 0; i < READERS; i++)
		pthread_create(&readers[i], NULL, read_all, &r);
	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		for (u32 i = 0; i < 100; i++, changes++) {
			u32 to = (u32)changes % 3;

			(void)fdb_learn(r.f, station(i % STAYS & ~1u), i % STAYS & ~1u, to ? WIRE + to - 1 : i % GUESTS,
					to ? FDB_WIRE : FDB_GUEST, 0);
			(void)fdb_learn(r.f, station(1000 + i), (u16)i, GUESTS, FDB_GUEST, 0);
			if (i % 10 == 9)
				fdb_flush(r.f, GUESTS, true);
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) / 1e9 < seconds);
	__atomic_store_n(&r.over, true, __ATOMIC_RELAXED);
	for (u32 i = 0; i < READERS; i++) {
		u64 *found;

		pthread_join(readers[i], (void **)&found);
		wrong += *found;
		free(found);
	}
	printf("%llu %llu\n", (unsigned long long)changes, (unsigned long long)wrong);
	fdb_free(r.f);
	return 0;
}

int main(int argc, char **argv)
{
	return argc > 2 ? race(atof(argv[2])) : flood();
}
