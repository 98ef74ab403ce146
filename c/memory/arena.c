#define _GNU_SOURCE
#include "arena.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "staging.h"

enum {
	/* A multiple of every size of huge pages. */
	ALIGNMENT = 1 << 30,
	FILLER = 1 << 24,
	STAT_BLOCK = 512,
	PAGE = 4096
};
/* More than a host has; what does not fit is mapped elsewhere, and copied. */
static const u64 RESERVED = 1ull << 40;

/* A page that is not in the page tables: SIGBUS to a thread that touches it, an error to a system call. */
static int open_watch(void)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_SHMEM |
					     UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_SHMEM |
					     UFFD_FEATURE_MINOR_HUGETLBFS};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) < 0) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static int watch(int fd, u8 *base, u64 length)
{
	struct uffdio_register all = {.range = {(uintptr_t)base, length},
				      .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR};

	return ioctl(fd, UFFDIO_REGISTER, &all) < 0 ? -errno : 0;
}

bool arena_unwatch(int watch, u8 *base, u64 length, u8 *fault)
{
	struct uffdio_range all = {(uintptr_t)base, length};
	int error = errno;

	/* Two threads may come here for the same window: what is no more watched is not an error. */
	(void)ioctl(watch, UFFDIO_UNREGISTER, &all);
	bool there = !madvise(fault - (uintptr_t)fault % PAGE, PAGE, MADV_POPULATE_READ);

	errno = error;
	return there;
}

static int reserve(u8 *at, u64 length)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;

	return mmap(at, length, PROT_NONE, flags, -1, 0) == MAP_FAILED ? -errno : 0;
}

/* What was not reserved again may be anybody's the next moment: nothing of the reservation is used any more. */
static void give_back(struct arena *a, u8 *at, u64 length)
{
	if (!reserve(at, length))
		return;
	munmap(at, length);
	a->spoiled = true;
	a->zerocopy = XN_ZEROCOPY_OFF;
	a->changes++;
}

int arena_init(struct arena *a, u32 sets, u32 frames, enum xn_zerocopy zerocopy)
{
	*a = (struct arena){
		.sets = sets, .frames = frames, .set_size = (u64)frames * XN_FRAME_SIZE, .watch = -1, .ready.fd = -1};
	if (!sets)
		return 0;
	a->owner = calloc(sets, sizeof(*a->owner));
	if (!a->owner)
		return -ENOMEM;
	if (zerocopy != XN_ZEROCOPY_OFF)
		a->watch = open_watch();
	if (a->watch >= 0) {
		u8 *start =
			mmap(NULL, RESERVED + ALIGNMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (start != MAP_FAILED) {
			u64 lead = -(uintptr_t)start % ALIGNMENT;

			munmap(start, lead);
			munmap(start + lead + RESERVED, ALIGNMENT - lead);
			a->base = start + lead;
			a->length = RESERVED;
			a->zerocopy = zerocopy;
		}
	}
	int fixed = a->base ? MAP_FIXED : 0;
	u8 *base = mmap(a->base, arena_private(a), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);

	if (base == MAP_FAILED) {
		int r = -errno;

		arena_release(a);
		return r;
	}
	/* What passes through here is guests' as well. Only advice, as for their memory. */
	(void)madvise(base, arena_private(a), MADV_DONTDUMP);
	a->base = base;
	if (!a->length)
		a->length = arena_private(a);
	return 0;
}

void arena_release(struct arena *a)
{
	if (a->base)
		munmap(a->base, a->spoiled ? arena_private(a) : a->length);
	free(a->owner);
	free(a->windows);
	if (a->watch >= 0)
		close(a->watch);
	if (a->ready.fd >= 0)
		close(a->ready.fd);
	*a = (struct arena){.watch = -1, .ready.fd = -1};
}

bool arena_wants(const struct arena *a, bool huge)
{
	return a->zerocopy == XN_ZEROCOPY_ON || (a->zerocopy == XN_ZEROCOPY_AUTO && huge);
}

/* The first gap that has room for what begins there in its file; its address, and the window that it is in front of. */
static u8 *find_gap(const struct arena *a, u64 length, u64 start, u64 page, u32 *at)
{
	const u64 alignment = staging_alignment(page);
	u8 *from = a->base + arena_private(a);

	for (u32 i = 0;; i++) {
		const u8 *end = i < a->windows_n ? a->windows[i]->base : a->base + a->length;

		from += (start - (uintptr_t)from) % alignment;
		if (from <= end && length <= (u64)(end - from)) {
			*at = i;
			return from;
		}
		if (i == a->windows_n)
			return NULL;
		from = a->windows[i]->base + a->windows[i]->length;
	}
}

bool arena_is_whole(int fd)
{
	struct stat st;

	return !fstat(fd, &st) && st.st_blocks >= st.st_size / STAT_BLOCK + !!(st.st_size % STAT_BLOCK);
}

static bool has_room(struct arena *a)
{
	u32 room = a->windows_room ? 2 * a->windows_room : 16;

	if (a->windows_n < a->windows_room)
		return true;
	struct mapping **more = realloc(a->windows, room * sizeof(*more));

	if (!more)
		return false;
	a->windows = more;
	a->windows_room = room;
	return true;
}

int arena_map(struct arena *a, struct mapping *map, int fd, u64 offset, u64 page, u8 **staged)
{
	u32 at;

	if (!arena_is_whole(fd))
		return -ENOSPC;
	if (!has_room(a))
		return -ENOMEM;
	u8 *base = find_gap(a, map->length, offset, page, &at);

	if (!base)
		return -ENOSPC;
	/* To map it elsewhere, should it move. */
	map->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (map->fd < 0)
		return -errno;
	bool moved = staging_move(*staged, map->length, offset, base);

	if (moved)
		*staged = NULL;
	/* A page that was punched meanwhile, and cannot be had again, must not be missed later. */
	if (!moved || watch(a->watch, base, map->length) < 0) {
		/* What failed may have unmapped what was there. */
		give_back(a, base, map->length);
		close(map->fd);
		return -ENOSPC;
	}
	map->offset = offset;
	memmove(&a->windows[at + 1], &a->windows[at], (a->windows_n - at) * sizeof(*a->windows));
	a->windows[at] = map;
	a->windows_n++;
	map->base = base;
	map->arena = a;
	map->umem = ++a->changes;
	return 0;
}

u8 *arena_unmap(struct arena *a, struct mapping *map)
{
	u32 at = 0;

	while (a->windows[at] != map)
		at++;
	a->windows_n--;
	memmove(&a->windows[at], &a->windows[at + 1], (a->windows_n - at) * sizeof(*a->windows));
	/* hugetlbfs cannot, and has few pages. */
	u8 *moved = map->huge ? NULL : staging_move(map->base, map->length, map->offset, NULL);

	give_back(a, map->base, map->length);
	close(map->fd);
	a->changes++;
	return moved;
}

u64 arena_umem(const struct arena *a, bool windows)
{
	return windows && a->windows_n && !a->spoiled ? a->changes : 0;
}

u64 arena_umem_length(const struct arena *a, u64 umem)
{
	const struct mapping *last = umem ? a->windows[a->windows_n - 1] : NULL;

	return last ? (u64)(last->base + last->length - a->base) : arena_private(a);
}

static int fill(struct arena *a, u8 *from, const u8 *to, int fd)
{
	(void)a;
	while (from < to) {
		u64 part = (u64)(to - from) < FILLER ? (u64)(to - from) : FILLER;

		if (mmap(from, part, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
			return -errno;
		from += part;
	}
	return 0;
}

/* Visits every stretch between the private frames and the last window that no window covers. */
static int each_hole(struct arena *a, int (*visit)(struct arena *a, u8 *from, const u8 *to, int fd), int fd)
{
	u8 *from = a->base + arena_private(a);
	int r = 0;

	for (u32 i = 0; i < a->windows_n && !r; i++) {
		if (from < a->windows[i]->base)
			r = visit(a, from, a->windows[i]->base, fd);
		from = a->windows[i]->base + a->windows[i]->length;
	}
	return r;
}

static int empty(struct arena *a, u8 *from, const u8 *to, int fd)
{
	(void)fd;
	give_back(a, from, (u64)(to - from));
	return 0;
}

int arena_fill_holes(struct arena *a)
{
	int fd = memfd_create("xdpnet-filler", MFD_CLOEXEC), r = 0;

	if (fd < 0)
		return -errno;
	if (ftruncate(fd, FILLER) < 0)
		r = -errno;
	if (!r)
		r = each_hole(a, fill, fd);
	/* What was taken away holds zeroes, and its rings are broken: it is not worth the pages. */
	for (u32 i = 0; i < a->windows_n && !r; i++)
		if (__atomic_load_n(&a->windows[i]->alarms->lost, __ATOMIC_ACQUIRE))
			r = fill(a, a->windows[i]->base, a->windows[i]->base + a->windows[i]->length, fd);
	close(fd);
	return r;
}

void arena_empty_holes(struct arena *a)
{
	(void)each_hole(a, empty, -1);
}

bool arena_find_moved(const struct arena *a)
{
	bool any = false;

	for (u32 i = 0; i < a->windows_n; i++) {
		const struct mapping *map = a->windows[i];

		if (madvise(map->base, map->length, MADV_POPULATE_WRITE) == 0)
			continue;
		__atomic_store_n(&map->alarms->moved, MEM_MOVED, __ATOMIC_RELEASE);
		any = true;
	}
	return any;
}
