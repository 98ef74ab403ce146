/*
 * Guest memory: the one door to guest bytes.
 *
 * A table is immutable once built; changes build a new one and swap it while the workers are parked. Guest bytes change
 * at any moment, so they are read through the g_ accessors, once, into locals. A range is translated whole, or piece by
 * piece at the borders of regions; nothing else in the core makes a pointer from a guest's number. What is known of a region
 * that is left out is where it lies.
 *
 * The file behind a region can be truncated under us: a SIGBUS handler then maps zeroes over the region and raises the
 * guest's alarm, upon which the worker breaks the port's rings. Of memory that may be lent another one tells of pages that
 * were given up and taken back (arena.h).
 */
#ifndef XN_MEM_H
#define XN_MEM_H

#include "arena.h"

struct region {
	u64 guest_addr;
	u64 size;
	u64 user_addr;
	u8 *host;
	struct mapping *mapping; /* NULL: it is left out */
};

struct mem {
	u32 n;	 /* regions that are mapped ... */
	u32 all; /* ... and, behind them, that are left out */
	struct region regions[XN_MAX_REGIONS];
};

/* A stretch of guest memory as the host sees it. */
struct piece {
	u8 *ptr;
	u32 len;
};

struct mem *mem_new(void);
/* A copy of `old` (NULL: empty) that shares its mappings. */
struct mem *mem_clone(const struct mem *old);
void mem_free(struct mem *m);
/* Into a window of the arena, if that wants it; NULL: it shall not. What the region has staged is used up in any case. */
int mem_add(struct mem *m, const struct xn_region *region, struct mem_alarms *alarms, struct arena *arena);
/* What a region has staged that mem_add() is not asked for any more. */
void mem_drop_staged(const struct xn_region *region);
int mem_remove(struct mem *m, const struct xn_region *region);
/* Maps what lies in windows elsewhere; -EINVAL: it is no longer all there. The table is then to be freed all the same. */
int mem_leave_windows(struct mem *m);
/* Host address of [user_addr, user_addr + len) of the frontend's own addresses; NULL if it is not in one region. */
void *mem_user(const struct mem *m, u64 user_addr, u64 len);
/* Of memory whose file may be truncated: its alarms are raised then, and nobody ends. */
int mem_guard(const struct mapping *map);
void mem_unguard(const struct mapping *map);
/* The first UMEM that has all of it; UINT64_MAX: none will. */
u64 mem_umem(const struct mem *m);
bool mem_is_huge(const struct mem *m);
/* Copies [*addr, *addr + len) into buf across regions; false if any of it is outside: *addr is the first that is. */
bool mem_read(const struct mem *m, u64 *addr, void *buf, u32 len);
/* Whether what is at this address, which is not mapped, lies in a region that is left out. */
bool mem_is_left_out(const struct mem *m, u64 addr);

/* Host address of guest physical `addr`, *len cut to what is contiguous there; NULL if outside. `hint`: last region hit. */
static inline u8 *mem_at(const struct mem *m, u32 *hint, u64 addr, u64 *len)
{
	u32 i = *hint;

	if (unlikely(i >= m->n || addr - m->regions[i].guest_addr >= m->regions[i].size)) {
		for (i = 0; i < m->n; i++)
			if (addr - m->regions[i].guest_addr < m->regions[i].size)
				break;
		if (i == m->n)
			return NULL;
		*hint = i;
	}
	u64 offset = addr - m->regions[i].guest_addr;
	u64 left = m->regions[i].size - offset;

	if (*len > left)
		*len = left;
	return m->regions[i].host + offset;
}

/* The guest physical address of a byte of ours; false: it is none of the guest's. */
static inline bool mem_guest(const struct mem *m, const u8 *host, u64 *addr)
{
	for (u32 i = 0; i < m->n; i++) {
		u64 offset = (u64)(host - m->regions[i].host);

		if (offset < m->regions[i].size) {
			*addr = m->regions[i].guest_addr + offset;
			return true;
		}
	}
	return false;
}

#ifdef XN_ORACLE
/* In a fuzz target: after each load, that gives it the guest's part: to store elsewhere, or to have had other bytes there. */
void oracle_loaded(const void *guest, void *loaded, size_t n);
#else
static inline void oracle_loaded(const void *guest, void *loaded, size_t n)
{
	(void)guest, (void)loaded, (void)n;
}
#endif

static inline u8 g_load8(const void *p)
{
	u8 v = __atomic_load_n((const u8 *)p, __ATOMIC_RELAXED);

	oracle_loaded(p, &v, sizeof(v));
	return v;
}

static inline u16 g_load16(const void *p)
{
	u16 v = __atomic_load_n((const u16 *)p, __ATOMIC_RELAXED);

	oracle_loaded(p, &v, sizeof(v));
	return v;
}

static inline u16 g_load16_acquire(const void *p)
{
	u16 v = __atomic_load_n((const u16 *)p, __ATOMIC_ACQUIRE);

	oracle_loaded(p, &v, sizeof(v));
	return v;
}

static inline u64 g_load64(const void *p)
{
	u64 v = __atomic_load_n((const u64 *)p, __ATOMIC_RELAXED);

	oracle_loaded(p, &v, sizeof(v));
	return v;
}

/* One snapshot of a descriptor's 16 bytes, of either layout: the guest may rewrite it at any moment. */
static inline void g_load_desc(void *to, const void *guest)
{
	const u64 words[2] = {g_load64(guest), g_load64((const u8 *)guest + 8)};

	memcpy(to, words, sizeof(words));
}

static inline void g_store16(void *p, u16 v)
{
	__atomic_store_n((u16 *)p, v, __ATOMIC_RELAXED);
}

static inline void g_store16_release(void *p, u16 v)
{
	__atomic_store_n((u16 *)p, v, __ATOMIC_RELEASE);
}

static inline void g_store32(void *p, u32 v)
{
	__atomic_store_n((u32 *)p, v, __ATOMIC_RELAXED);
}

/* The barrier makes the copy the only read: the compiler may not go back to guest memory for a byte of it. */
static inline void g_copy_from(void *to, const void *guest, size_t n)
{
	memcpy(to, guest, n);
	oracle_loaded(guest, to, n);
	__asm__ volatile("" ::: "memory");
}

static inline void g_copy_to(void *guest, const void *from, size_t n)
{
	memcpy(guest, from, n);
}

/* Of frames, from one guest to another too. Small ones have too few bytes to be worth the call. */
static inline void g_copy(u8 *to, const u8 *from, u32 n)
{
	if (n > 2 * 16) {
		memcpy(to, from, n);
	} else if (n >= 16) {
		u8 a[16], b[16];

		/* Two blocks that may overlap. */
		memcpy(a, from, 16);
		memcpy(b, from + n - 16, 16);
		memcpy(to, a, 16);
		memcpy(to + n - 16, b, 16);
	} else {
		for (u32 i = 0; i < n; i++)
			to[i] = from[i];
	}
	__asm__ volatile("" ::: "memory");
}

#endif
