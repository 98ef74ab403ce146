/*
 * Preloaded: makes one request of the C core for memory, a mapping, a descriptor, a socket, a thread or chance fail.
 *
 * Only requests that come from one loaded object count, the one that scarcity_watch() was given an address in. The
 * interpreter's own go through. Also counts what of memory that object holds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { MOST_HELD = 4096 };

extern void *__libc_malloc(size_t size), *__libc_calloc(size_t n, size_t size), *__libc_realloc(void *p, size_t size),
	*__libc_memalign(size_t align, size_t size);
extern void __libc_free(void *p);

static uintptr_t from, to; /* the watched object */
static uint32_t made, fails_at;
static void *held[MOST_HELD];

static int find(struct dl_phdr_info *info, size_t size, void *data)
{
	const uintptr_t wanted = *(uintptr_t *)data;

	(void)size;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];
		uintptr_t start = info->dlpi_addr + part->p_vaddr;

		if (part->p_type == PT_LOAD && wanted >= start && wanted < start + part->p_memsz) {
			from = start;
			to = start + part->p_memsz;
			return 1;
		}
	}
	return 0;
}

/* The object whose code this address is in; 0: found. */
int scarcity_watch(void *address)
{
	uintptr_t wanted = (uintptr_t)address;

	return dl_iterate_phdr(find, &wanted) ? 0 : -1;
}

/* Counts anew from 1: request number n fails; 0: none does. */
void scarcity_arm(uint32_t n)
{
	__atomic_store_n(&made, 0, __ATOMIC_SEQ_CST);
	__atomic_store_n(&fails_at, n, __ATOMIC_SEQ_CST);
}

/* Requests since then. */
uint32_t scarcity_made(void)
{
	return __atomic_load_n(&made, __ATOMIC_SEQ_CST);
}

/* Blocks of memory that the object has and has not freed. */
uint32_t scarcity_held(void)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < MOST_HELD; i++)
		n += !!__atomic_load_n(&held[i], __ATOMIC_SEQ_CST);
	return n;
}

static int is_watched(void *caller)
{
	return (uintptr_t)caller >= from && (uintptr_t)caller < to;
}

/* Whether this request is the one. */
static int fails(void *caller, int error)
{
	if (!is_watched(caller) || __atomic_add_fetch(&made, 1, __ATOMIC_SEQ_CST) != fails_at)
		return 0;
	errno = error;
	return 1;
}

static void *note(void *caller, void *p)
{
	if (p && is_watched(caller))
		for (uint32_t i = 0; i < MOST_HELD; i++) {
			void *none = NULL;

			if (__atomic_compare_exchange_n(&held[i], &none, p, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
				break;
		}
	return p;
}

static void forget(void *p)
{
	for (uint32_t i = 0; p && i < MOST_HELD; i++) {
		void *same = p;

		if (__atomic_compare_exchange_n(&held[i], &same, NULL, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
			break;
	}
}

#define CALLER __builtin_return_address(0)

/* ---- memory ---- */

void *malloc(size_t size)
{
	return fails(CALLER, ENOMEM) ? NULL : note(CALLER, __libc_malloc(size));
}

void *calloc(size_t n, size_t size)
{
	return fails(CALLER, ENOMEM) ? NULL : note(CALLER, __libc_calloc(n, size));
}

void *realloc(void *p, size_t size)
{
	if (fails(CALLER, ENOMEM))
		return NULL;
	if (!is_watched(CALLER))
		return __libc_realloc(p, size);
	forget(p);
	return note(CALLER, __libc_realloc(p, size));
}

void *aligned_alloc(size_t align, size_t size)
{
	return fails(CALLER, ENOMEM) ? NULL : note(CALLER, __libc_memalign(align, size));
}

void free(void *p)
{
	if (is_watched(CALLER))
		forget(p);
	__libc_free(p);
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
	if (fails(CALLER, ENOMEM))
		return MAP_FAILED;
	return (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
}

int madvise(void *at, size_t length, int advice)
{
	return fails(CALLER, ENOMEM) ? -1 : (int)syscall(SYS_madvise, at, length, advice);
}

/* ---- descriptors ---- */

int eventfd(unsigned int value, int flags)
{
	return fails(CALLER, EMFILE) ? -1 : (int)syscall(SYS_eventfd2, value, flags);
}

int epoll_create1(int flags)
{
	return fails(CALLER, EMFILE) ? -1 : (int)syscall(SYS_epoll_create1, flags);
}

int epoll_ctl(int fd, int what, int of, struct epoll_event *event)
{
	if (what == EPOLL_CTL_ADD && fails(CALLER, ENOSPC))
		return -1;
	return (int)syscall(SYS_epoll_ctl, fd, what, of, event);
}

int memfd_create(const char *name, unsigned int flags)
{
	return fails(CALLER, EMFILE) ? -1 : (int)syscall(SYS_memfd_create, name, flags);
}

int ftruncate(int fd, off_t length)
{
	return fails(CALLER, ENOSPC) ? -1 : (int)syscall(SYS_ftruncate, fd, length);
}

int fcntl(int fd, int what, ...)
{
	va_list list;

	va_start(list, what);
	void *argument = va_arg(list, void *);

	va_end(list);
	return fails(CALLER, EMFILE) ? -1 : (int)syscall(SYS_fcntl, fd, what, argument);
}

int open(const char *path, int flags, ...)
{
	va_list list;

	va_start(list, flags);
	mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0;

	va_end(list);
	return fails(CALLER, EMFILE) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int fstat(int fd, struct stat *into)
{
	return fails(CALLER, ENOMEM) ? -1 : (int)syscall(SYS_fstat, fd, into);
}

int fstatfs(int fd, struct statfs *into)
{
	return fails(CALLER, ENOMEM) ? -1 : (int)syscall(SYS_fstatfs, fd, into);
}

int socket(int domain, int type, int protocol)
{
	return fails(CALLER, EMFILE) ? -1 : (int)syscall(SYS_socket, domain, type, protocol);
}

int setsockopt(int fd, int level, int option, const void *value, socklen_t length)
{
	return fails(CALLER, ENOBUFS) ? -1 : (int)syscall(SYS_setsockopt, fd, level, option, value, length);
}

int getsockopt(int fd, int level, int option, void *restrict value, socklen_t *restrict length)
{
	return fails(CALLER, ENOBUFS) ? -1 : (int)syscall(SYS_getsockopt, fd, level, option, value, length);
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
	return fails(CALLER, ENOMEM) ? -1 : (int)syscall(SYS_bind, fd, address, length);
}

/* ---- chance ---- */

ssize_t getrandom(void *into, size_t length, unsigned int flags)
{
	return fails(CALLER, EINTR) ? -1 : syscall(SYS_getrandom, into, length, flags);
}

/* ---- threads ---- */

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
	static int (*original)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

	if (fails(CALLER, EAGAIN))
		return EAGAIN;
	if (!original)
		original = (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))(uintptr_t)dlsym(
			RTLD_NEXT, "pthread_create");
	return original(thread, attributes, start, argument);
}
