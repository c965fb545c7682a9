// Answers for the floor of the bench: a ublk server that is nothing but its loop. One queue, one
// thread, one block device below; what cannot be left out and no more (no layers, no retries).
//
// bare ID FILE: serves FILE as /dev/ublkbID; returns when the disk is there.
//
// Registered files, a registered ring, automatic buffer registration, DEFER_TASKRUN. The numbers
// are those of include/uapi/linux/ublk_cmd.h and io_uring.h, Linux 7.3.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DEPTH = 64 };
enum { OP_READ_FIXED = 4, OP_WRITE_FIXED = 5, OP_URING_CMD = 46, FIXED_FILE = 1 };
enum { ADD_DEV = 0xc0207504, START_DEV = 0xc0207506, SET_PARAMS = 0xc0207508 };
enum { FETCH_REQ = 0xc0107520, COMMIT_AND_FETCH_REQ = 0xc0107521 };
#define FEATURES (1ull << 0 | 1ull << 6 | 1ull << 11 | 1ull << 18)
#define SPLICE (1ull << 32)

struct sqe {
	uint8_t opcode, flags;
	uint16_t ioprio;
	int32_t fd;
	uint64_t off, addr;
	uint32_t len, op_flags;
	uint64_t user_data;
	uint16_t buf_index, personality;
	uint32_t file_index;
	uint64_t cmd[2];
};

struct cqe {
	uint64_t user_data;
	int32_t result;
	uint32_t flags;
};

struct params {
	uint32_t sq_entries, cq_entries, flags, cpu, idle, features, wq_fd, resv[3];
	struct { uint32_t head, tail, mask, entries, flags, dropped, array, resv; uint64_t user; } sq;
	struct { uint32_t head, tail, mask, entries, overflow, cqes, flags, resv; uint64_t user; } cq;
};

struct desc {
	uint32_t op_flags, sectors;
	uint64_t start, addr;
};

struct info {
	uint16_t queues, depth, state, pad0;
	uint32_t max_io, id;
	int32_t pid;
	uint32_t pad1;
	uint64_t flags, server_flags;
	uint32_t uid, gid;
	uint64_t resv[2];
};

struct ublk_params {
	uint32_t len, types, attrs;
	uint8_t logical, physical, opt, min;
	uint32_t max_sectors, chunk_sectors;
	uint64_t sectors, virt_boundary;
	uint8_t rest[112];
};

struct ring {
	int fd;
	_Atomic uint32_t *sq_tail, *cq_head, *cq_tail;
	uint32_t sq_mask, cq_mask, tail, head, entry_size;
	uint8_t *sqes;
	struct cqe *cqes;
};

static void check(int bad, const char *what)
{
	if (bad) {
		fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
		_exit(1);
	}
}

static void make_ring(struct ring *r, uint32_t entries, uint32_t flags, uint32_t entry_size)
{
	struct params p = { .flags = flags };
	r->fd = syscall(SYS_io_uring_setup, entries, &p);
	check(r->fd < 0, "io_uring_setup");
	int prot = PROT_READ | PROT_WRITE, how = MAP_SHARED | MAP_POPULATE;
	size_t bytes = p.cq.cqes + p.cq_entries * sizeof(struct cqe);
	uint8_t *rings = mmap(0, bytes, prot, how, r->fd, 0);
	r->sqes = mmap(0, p.sq_entries * entry_size, prot, how, r->fd, 0x10000000);
	check(rings == MAP_FAILED || r->sqes == MAP_FAILED, "mmap");
	r->sq_tail = (void *)(rings + p.sq.tail);
	r->cq_head = (void *)(rings + p.cq.head);
	r->cq_tail = (void *)(rings + p.cq.tail);
	r->cqes = (void *)(rings + p.cq.cqes);
	r->sq_mask = p.sq_entries - 1;
	r->cq_mask = p.cq_entries - 1;
	r->entry_size = entry_size;
	r->tail = r->head = 0;
}

static struct sqe *next_sqe(struct ring *r)
{
	struct sqe *sqe = (void *)(r->sqes + (r->tail++ & r->sq_mask) * (size_t)r->entry_size);
	memset(sqe, 0, sizeof *sqe);
	return sqe;
}

// One control command on a ring of its own, with entries of 128 bytes.
static void control(struct ring *r, int fd, uint32_t op, uint32_t id, void *buffer,
		    uint16_t len, uint64_t data)
{
	struct sqe *sqe = next_sqe(r);
	sqe->opcode = OP_URING_CMD;
	sqe->fd = fd;
	sqe->off = op;
	struct { uint32_t id; uint16_t queue, len; uint64_t addr, data; uint64_t rest; } c = {
		id, 0xffff, len, (uintptr_t)buffer, data, 0
	};
	memcpy(sqe->cmd, &c, sizeof c);
	atomic_store_explicit(r->sq_tail, r->tail, memory_order_release);
	while (atomic_load_explicit(r->cq_tail, memory_order_acquire) == r->head)
		syscall(SYS_io_uring_enter, r->fd, 1, 1, 1, 0, 0);
	errno = -r->cqes[r->head & r->cq_mask].result;
	check(errno > 0, "ublk control command");
	atomic_store_explicit(r->cq_head, ++r->head, memory_order_release);
}

static int char_fd, file_fd;
static pthread_barrier_t fetched;

static void fetch(struct ring *r, uint32_t op, uint16_t tag, int32_t result)
{
	struct sqe *sqe = next_sqe(r);
	sqe->opcode = OP_URING_CMD;
	sqe->flags = FIXED_FILE;
	sqe->off = op;
	sqe->addr = tag;
	sqe->user_data = tag;
	sqe->cmd[0] = (uint64_t)tag << 16 | (uint64_t)(uint32_t)result << 32;
}

static void *serve(void *unused)
{
	struct ring ring, *r = &ring;
	// SUBMIT_ALL, SINGLE_ISSUER, DEFER_TASKRUN, NO_SQARRAY.
	make_ring(r, 256, 1 << 7 | 1 << 12 | 1 << 13 | 1 << 16, sizeof(struct sqe));
	struct { uint32_t nr, flags; uint64_t resv, data, tags; } table = { DEPTH, 1, 0, 0, 0 };
	int files[2] = { char_fd, file_fd };
	struct { uint32_t offset, resv; uint64_t data; } self = { -1u, 0, (uint64_t)r->fd };
	check(syscall(SYS_io_uring_register, r->fd, 15, &table, sizeof table) < 0, "buffers");
	check(syscall(SYS_io_uring_register, r->fd, 2, files, 2) < 0, "files");
	check(syscall(SYS_io_uring_register, r->fd, 20, &self, 1) != 1, "ring");
	const volatile struct desc *descs =
		mmap(0, DEPTH * sizeof(struct desc), PROT_READ, MAP_SHARED, char_fd, 0);
	check(descs == MAP_FAILED, "descriptors");
	static uint32_t lens[DEPTH];
	uint32_t submitted = 0;
	for (int tag = 0; tag < DEPTH; tag++)
		fetch(r, FETCH_REQ, tag, 0);
	for (int dead = 0, first = 1; dead < DEPTH; first = 0) {
		uint32_t count = r->tail - submitted;
		submitted = r->tail;
		atomic_store_explicit(r->sq_tail, r->tail, memory_order_release);
		// GETEVENTS, REGISTERED_RING.
		int done = syscall(SYS_io_uring_enter, self.offset, count, !first, 1 | 1 << 4, 0, 0);
		check(done < 0 && errno != EINTR, "io_uring_enter");
		if (first)
			pthread_barrier_wait(&fetched);
		uint32_t tail = atomic_load_explicit(r->cq_tail, memory_order_acquire);
		for (; r->head != tail; r->head++) {
			const struct cqe *cqe = &r->cqes[r->head & r->cq_mask];
			uint16_t tag = cqe->user_data;
			if (cqe->user_data & SPLICE) {
				int whole = cqe->result == (int32_t)lens[tag];
				fetch(r, COMMIT_AND_FETCH_REQ, tag, whole ? cqe->result : -EIO);
				continue;
			}
			if (cqe->result != 0) {
				dead++;
				continue;
			}
			uint32_t op = descs[tag].op_flags & 0xff;
			if (op > 1) {
				fetch(r, COMMIT_AND_FETCH_REQ, tag, -EOPNOTSUPP);
				continue;
			}
			struct sqe *sqe = next_sqe(r);
			sqe->opcode = op == 0 ? OP_READ_FIXED : OP_WRITE_FIXED;
			sqe->flags = FIXED_FILE;
			sqe->fd = 1;
			sqe->off = descs[tag].start << 9;
			sqe->len = lens[tag] = descs[tag].sectors << 9;
			sqe->buf_index = tag;
			sqe->user_data = SPLICE | tag;
		}
		atomic_store_explicit(r->cq_head, r->head, memory_order_release);
	}
	return unused;
}

static void server(uint32_t id, const char *file, int told)
{
	int control_fd = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
	check(control_fd < 0, "/dev/ublk-control");
	file_fd = open(file, O_RDWR | O_DIRECT | O_CLOEXEC);
	check(file_fd < 0, file);
	struct ring commands;
	// SQE128, NO_SQARRAY.
	make_ring(&commands, 4, 1 << 10 | 1 << 16, 128);
	struct info info = { .queues = 1, .depth = DEPTH, .max_io = 1 << 20, .id = id, .flags = FEATURES };
	control(&commands, control_fd, ADD_DEV, id, &info, sizeof info, 0);
	struct ublk_params params = { .len = sizeof params, .types = 1, .logical = 9, .physical = 12,
		.opt = 12, .min = 9, .max_sectors = 2048 };
	uint64_t size = 0;
	check(ioctl(file_fd, _IOR(0x12, 114, size_t), &size) < 0, "the size of the file");
	params.sectors = size >> 9;
	control(&commands, control_fd, SET_PARAMS, id, &params, sizeof params, 0);
	char path[40];
	snprintf(path, sizeof path, "/dev/ublkc%u", id);
	for (int tries = 0; tries < 1000 && (char_fd = open(path, O_RDWR | O_CLOEXEC)) < 0; tries++)
		usleep(1000);
	check(char_fd < 0, path);
	pthread_barrier_init(&fetched, 0, 2);
	pthread_t thread;
	check(pthread_create(&thread, 0, serve, 0), "thread");
	pthread_barrier_wait(&fetched);
	control(&commands, control_fd, START_DEV, id, 0, 0, getpid());
	check(write(told, "", 1) != 1, "pipe");
	pthread_join(thread, 0);
}

int main(int count, char **words)
{
	int news[2];
	char byte;
	if (count != 3) {
		fprintf(stderr, "usage: bare ID FILE\n");
		return 2;
	}
	check(pipe2(news, O_CLOEXEC), "pipe");
	pid_t child = fork();
	check(child < 0, "fork");
	if (child == 0) {
		setsid();
		server(atoi(words[1]), words[2], news[1]);
		return 0;
	}
	close(news[1]);
	return read(news[0], &byte, 1) != 1;
}
