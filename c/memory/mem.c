#define _GNU_SOURCE
#include "mem.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "staging.h"

/*
 * Every live mapping, for the SIGBUS handler. The control thread fills and empties slots; a handler on another thread
 * reads them. A slot is valid while base is set: the rest is written before base, base is cleared first.
 */
enum { GUARDS = XN_MAX_PORTS * (XN_MAX_REGIONS + 1) }; /* a dirty log is one more */
static struct guard {
	u8 *base;
	size_t length;
	struct mem_alarms *alarms;
	int watch; /* of the arena that it is a window of; -1: it is none */
} guards[GUARDS];
static u32 guards_used;
static struct sigaction previous_sigbus;
static pthread_once_t sigbus_once = PTHREAD_ONCE_INIT;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	u8 *fault = info->si_addr;
	u32 used = __atomic_load_n(&guards_used, __ATOMIC_ACQUIRE);

	for (u32 i = 0; i < used; i++) {
		u8 *base = __atomic_load_n(&guards[i].base, __ATOMIC_ACQUIRE);

		if (!base || fault < base || fault >= base + guards[i].length)
			continue;
		/* A page that is there after all is another than was pinned. The alarm first: others touch the next pages. */
		if (guards[i].watch >= 0) {
			__atomic_store_n(&guards[i].alarms->moved, MEM_MOVED, __ATOMIC_SEQ_CST);
			if (arena_unwatch(guards[i].watch, base, guards[i].length, fault))
				return;
		}
		/* The whole mapping, not a page: huge pages cannot be split, and the next page would fault as well. */
		if (mmap(base, guards[i].length, PROT_READ | PROT_WRITE,
			 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED)
			break;
		__atomic_store_n(&guards[i].alarms->lost, 1, __ATOMIC_RELEASE);
		return;
	}
	/* Not guest memory: as if we were not here. */
	if (previous_sigbus.sa_flags & SA_SIGINFO) {
		previous_sigbus.sa_sigaction(sig, info, context);
		return;
	}
	sigaction(SIGBUS, &previous_sigbus, NULL);
}

static void install_sigbus(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};

	sigemptyset(&action.sa_mask);
	sigaction(SIGBUS, &action, &previous_sigbus);
}

int mem_guard(const struct mapping *map)
{
	pthread_once(&sigbus_once, install_sigbus);
	for (u32 i = 0; i < GUARDS; i++) {
		if (guards[i].base)
			continue;
		guards[i].length = map->length;
		guards[i].alarms = map->alarms;
		guards[i].watch = map->arena ? map->arena->watch : -1;
		__atomic_store_n(&guards[i].base, map->base, __ATOMIC_RELEASE);
		if (i >= guards_used)
			__atomic_store_n(&guards_used, i + 1, __ATOMIC_RELEASE);
		return 0;
	}
	return -ENOSPC;
}

void mem_unguard(const struct mapping *map)
{
	for (u32 i = 0; i < guards_used; i++)
		if (guards[i].base == map->base)
			__atomic_store_n(&guards[i].base, NULL, __ATOMIC_RELEASE);
}

/* Uses up what the region has staged. */
static int map_file(struct mapping *map, const struct xn_region *region, const struct extent *e, struct arena *arena)
{
	u8 *staged = (u8 *)(uintptr_t)region->staged.base;
	bool wanted = arena && arena_wants(arena, e->huge), filled = region->filled;

	if (!staged) {
		staged = staging_map(e, region->fd);
		if (!staged)
			return -errno;
		filled = wanted && arena_is_whole(region->fd) && !madvise(staged, e->length, MADV_POPULATE_WRITE);
	}
	/* What could not be filled holds nothing to lend. */
	if (wanted && filled) {
		int r = arena_map(arena, map, region->fd, e->start, e->page, &staged);

		if (r == -ENOSPC && !staged)
			staged = staging_map(e, region->fd);
		else if (r < 0 && r != -ENOSPC)
			staging_unmap(staged, e->length, e->huge);
		if (r != -ENOSPC)
			return r;
	}
	map->base = staged;
	return map->base ? 0 : -errno;
}

static void unmap_file(struct mapping *map)
{
	u8 *base = map->arena ? arena_unmap(map->arena, map) : map->base;

	if (base)
		staging_unmap(base, map->length, map->huge);
}

static int mapping_new(struct mapping **out, const struct xn_region *region, u8 **host, struct mem_alarms *alarms,
		       struct arena *arena)
{
	struct extent e;
	int r = staging_extent(region, &e);

	if (!r && region->staged.base && region->staged.length != e.length)
		r = -EINVAL;
	struct mapping *map = r < 0 ? NULL : calloc(1, sizeof(*map));

	if (!map) {
		mem_drop_staged(region);
		return r < 0 ? r : -ENOMEM;
	}
	map->length = e.length;
	map->alarms = alarms;
	map->refs = 1;
	map->huge = e.huge;
	r = map_file(map, region, &e, arena);
	if (r < 0)
		goto no_map;
	r = mem_guard(map);
	if (r < 0)
		goto no_guard;
	*host = map->base + e.lead;
	*out = map;
	return 0;
no_guard:
	unmap_file(map);
no_map:
	free(map);
	return r;
}

static void mapping_put(struct mapping *map)
{
	if (--map->refs)
		return;
	mem_unguard(map);
	unmap_file(map);
	free(map);
}

struct mem *mem_new(void)
{
	return calloc(1, sizeof(struct mem));
}

struct mem *mem_clone(const struct mem *old)
{
	struct mem *m = mem_new();

	if (m && old) {
		*m = *old;
		for (u32 i = 0; i < m->n; i++)
			m->regions[i].mapping->refs++;
	}
	return m;
}

void mem_free(struct mem *m)
{
	if (!m)
		return;
	for (u32 i = 0; i < m->n; i++)
		mapping_put(m->regions[i].mapping);
	free(m);
}

static bool overlap(u64 a, u64 a_size, u64 b, u64 b_size)
{
	return a < b + b_size && b < a + a_size;
}

static int check_region(const struct mem *m, const struct xn_region *region)
{
	if (m->all == XN_MAX_REGIONS)
		return -ENOSPC;
	if (!region->size || region->guest_addr + region->size < region->guest_addr ||
	    region->user_addr + region->size < region->user_addr)
		return -EINVAL;
	for (u32 i = 0; i < m->all; i++)
		if (overlap(region->guest_addr, region->size, m->regions[i].guest_addr, m->regions[i].size) ||
		    overlap(region->user_addr, region->size, m->regions[i].user_addr, m->regions[i].size))
			return -EEXIST;
	return 0;
}

void mem_drop_staged(const struct xn_region *region)
{
	if (region->staged.base)
		xn_staged_close(&region->staged);
}

int mem_add(struct mem *m, const struct xn_region *region, struct mem_alarms *alarms, struct arena *arena)
{
	struct region added = {.guest_addr = region->guest_addr, .size = region->size, .user_addr = region->user_addr};
	int error = check_region(m, region);

	if (error < 0 || region->left_out)
		mem_drop_staged(region);
	else
		error = mapping_new(&added.mapping, region, &added.host, alarms, arena);
	if (error < 0)
		return error;
	struct region *at = &m->regions[added.mapping ? m->n++ : m->all];

	memmove(at + 1, at, (size_t)(&m->regions[m->all] - at) * sizeof(*at));
	*at = added;
	m->all++;
	return 0;
}

int mem_remove(struct mem *m, const struct xn_region *region)
{
	for (u32 i = 0; i < m->all; i++) {
		struct region *r = &m->regions[i];

		if (r->guest_addr != region->guest_addr || r->size != region->size || r->user_addr != region->user_addr)
			continue;
		if (r->mapping) {
			mapping_put(r->mapping);
			m->n--;
		}
		memmove(r, r + 1, (m->all - i - 1) * sizeof(*r));
		m->all--;
		return 0;
	}
	return -ENOENT;
}

int mem_leave_windows(struct mem *m)
{
	for (u32 i = 0; i < m->n; i++) {
		struct region *r = &m->regions[i];
		struct mapping *window = r->mapping;

		if (!window->arena)
			continue;
		const struct xn_region same = {
			.size = r->size, .offset = window->offset + (u64)(r->host - window->base), .fd = window->fd};
		int error = mapping_new(&r->mapping, &same, &r->host, window->alarms, NULL);

		if (error < 0) {
			r->mapping = window;
			return error;
		}
		mapping_put(window);
	}
	return 0;
}

void *mem_user(const struct mem *m, u64 user_addr, u64 len)
{
	for (u32 i = 0; m && i < m->n; i++) {
		u64 offset = user_addr - m->regions[i].user_addr;

		if (offset < m->regions[i].size && len <= m->regions[i].size - offset)
			return m->regions[i].host + offset;
	}
	return NULL;
}

u64 mem_umem(const struct mem *m)
{
	u64 umem = 0;

	if (!m || !m->n)
		return UINT64_MAX;
	for (u32 i = 0; i < m->n; i++) {
		const struct mapping *map = m->regions[i].mapping;

		if (!map->arena)
			return UINT64_MAX;
		if (map->umem > umem)
			umem = map->umem;
	}
	return umem;
}

bool mem_is_huge(const struct mem *m)
{
	for (u32 i = 0; m && i < m->n; i++)
		if (!m->regions[i].mapping->huge)
			return false;
	return m;
}

bool mem_read(const struct mem *m, u64 *addr, void *buf, u32 len)
{
	u32 hint = 0;
	u8 *to = buf;

	while (len) {
		u64 n = len;
		const u8 *from = mem_at(m, &hint, *addr, &n);

		if (!from)
			return false;
		g_copy_from(to, from, n);
		to += n;
		*addr += n;
		len -= (u32)n;
	}
	return true;
}

bool mem_is_left_out(const struct mem *m, u64 addr)
{
	for (u32 i = m->n; i < m->all; i++)
		if (addr - m->regions[i].guest_addr < m->regions[i].size)
			return true;
	return false;
}
