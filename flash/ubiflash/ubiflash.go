// Package ubiflash is UBI volumes of Linux, what NAND should be used through: UBI
// takes care of bad blocks, wear and bit errors.
//
// [Open] returns a volume as an [ota.Flash] that is written as UBI wants it, by a
// volume update: from the first byte to the last, in order. That is how the library
// installs a part; writes at other places fail with [ErrOrder]. What a part does
// not fill reads as 0xFF. While an update is under way nothing can be read, and one
// that the power interrupted leaves a volume that cannot be read at all until it is
// written anew: [ErrInterrupted]. A volume is therefore good for a part of
// a slot, not for a boot record. A record goes into a [LEB] of a volume, which is
// replaced atomically.
//
// [Swap] exchanges the names of volumes atomically: a switch between two slots for
// boot loaders that go by names, such as U-Boot with "ubi part; ubifsmount".
//
// The interface is that of torvalds/linux, include/uapi/mtd/ubi-user.h. On other
// systems everything returns an error that wraps ota.ErrUnsupported.
package ubiflash

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"sync"

	"github.com/slotota/ota"
)

var (
	// ErrOrder is wrapped by the error of a write that does not continue where the
	// last one ended, nor begins at 0.
	ErrOrder = errors.New("a UBI volume is written from its start to its end")
	// ErrUpdating is wrapped by the error of a read between the first write and
	// Sync.
	ErrUpdating = errors.New("the volume is being written")
	// ErrInterrupted is wrapped by the error of a read of a volume whose update was
	// interrupted.
	ErrInterrupted = errors.New("the volume's last update was interrupted")
)

// Info is what the kernel tells about a volume.
type Info struct {
	Name string
	// Size is the number of bytes reserved for it, LEBSize that of one of its logical
	// erase blocks.
	Size, LEBSize int64
	// Static volumes are checked as a whole, and cannot be written but by an update.
	Static bool
	// Interrupted says that its last update was interrupted.
	Interrupted bool
}

// Options configure [Open]. The zero value takes the whole volume.
type Options struct {
	// Size is how many bytes are used; 0 means all.
	Size int64
	// ReadOnly refuses all writes.
	ReadOnly bool
}

// volume is what the kernel does.
type volume interface {
	io.ReaderAt
	io.Writer // continues an update, or a change of a LEB
	info() (Info, error)
	update(bytes int64) error         // UBI_IOCVOLUP
	change(lnum int32, n int32) error // UBI_IOCEBCH
	reopen() error                    // gives up an update that is under way
	close() error
}

// isInterrupted reports whether err is that of reading a volume whose update was
// interrupted.
func isInterrupted(err error) bool { return errors.Is(err, errBadVolume) }

// Flash is an [ota.Flash] that takes writes in order only. It is safe for concurrent
// use.
type Flash struct {
	v        volume
	name     string
	size     int64
	readOnly bool

	mu     sync.RWMutex
	next   int64 // where the update under way goes on, 0 if there is none
	failed error // why the update under way cannot go on
}

// Open opens the volume at path, a device such as /dev/ubi0_3, or a name such as
// "ubi0:rootfs-a". o may be nil.
func Open(path string, o *Options) (*Flash, error) {
	if o == nil {
		o = &Options{}
	}
	v, err := openVolume(path, o.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("ubiflash: %w", err)
	}
	f, err := newFlash(v, path, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ubiflash: %s: %w", strconv.Quote(path), err), v.close())
	}
	return f, nil
}

func newFlash(v volume, name string, o *Options) (*Flash, error) {
	info, err := v.info()
	if err != nil {
		return nil, err
	}
	f := &Flash{v: v, name: name, size: o.Size, readOnly: o.ReadOnly}
	if f.size == 0 {
		f.size = info.Size
	}
	if f.size <= 0 || f.size > info.Size {
		return nil, fmt.Errorf("size %d of %d: %w", o.Size, info.Size, ota.ErrInvalid)
	}
	return f, nil
}

// Info returns what the kernel tells about the volume now.
func (f *Flash) Info() (Info, error) { return f.v.info() }

// WritesInSequence implements [ota.SequentialWriter].
func (f *Flash) WritesInSequence() bool { return true }

// Size implements ota.Flash.
func (f *Flash) Size() int64 { return f.size }

// ReadAt implements io.ReaderAt.
func (f *Flash) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, f.errorf("read at %d: %w", off, ota.ErrInvalid)
	}
	var eof error
	if rest := max(0, f.size-off); int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, eof
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.next > 0 || f.failed != nil {
		return 0, f.errorf("read at %d: %w", off, ErrUpdating)
	}
	n, err := f.v.ReadAt(p, off)
	switch {
	case n == len(p):
		return n, eof
	case isInterrupted(err):
		err = fmt.Errorf("%w: %w", ErrInterrupted, err)
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return n, f.errorf("read of %d bytes at %d: %w", len(p), off, err)
}

// WriteAt implements io.WriterAt, in order: a write at 0 begins an update of the
// volume, whose old content is gone from then on; each other write must go on where
// the last one ended. The update is complete when the last byte is written, or by
// Sync.
func (f *Flash) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case f.readOnly:
		return 0, f.errorf("write at %d: %w", off, ota.ErrReadOnly)
	case off < 0:
		return 0, f.errorf("write at %d: %w", off, ota.ErrInvalid)
	case off > f.size || int64(len(p)) > f.size-off:
		return 0, f.errorf("write of %d bytes at %d: outside of %d bytes: %w", len(p), off, f.size, ota.ErrTooLarge)
	case len(p) == 0:
		return 0, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if off == 0 {
		if err := f.begin(); err != nil {
			return 0, f.errorf("update: %w", err)
		}
	}
	switch {
	case f.failed != nil:
		return 0, f.errorf("write at %d: an earlier write failed: %w", off, f.failed)
	case off != f.next:
		return 0, f.errorf("write at %d, expected at %d: %w", off, f.next, ErrOrder)
	}
	n, err := f.write(p)
	if err != nil {
		return n, f.errorf("write of %d bytes at %d: %w", len(p), off, err)
	}
	return n, nil
}

// begin begins an update.
func (f *Flash) begin() error {
	if f.next > 0 || f.failed != nil {
		if err := f.v.reopen(); err != nil {
			f.failed = err
			return err
		}
	}
	f.next = 0
	// If it fails half-way the kernel takes the volume for one that is being updated.
	f.failed = f.v.update(f.size)
	return f.failed
}

// write continues the update.
func (f *Flash) write(p []byte) (int, error) {
	n, err := f.v.Write(p)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		f.failed = err
		return n, err
	}
	if f.next += int64(n); f.next == f.size {
		f.next = 0 // the kernel has completed it
	}
	return n, nil
}

// fillSize is how much of the rest of a volume is filled at once.
const fillSize = 64 << 10

// Sync completes the update under way, with 0xFF up to the size of the Flash.
func (f *Flash) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return f.errorf("an earlier write failed: %w", f.failed)
	}
	if f.next == 0 {
		return nil
	}
	pad := make([]byte, min(fillSize, f.size-f.next))
	for i := range pad {
		pad[i] = 0xff
	}
	for f.next > 0 {
		if _, err := f.write(pad[:min(int64(len(pad)), f.size-f.next)]); err != nil {
			return f.errorf("completing the update: %w", err)
		}
	}
	return nil
}

// Close closes the volume. An update that was not completed stays interrupted.
func (f *Flash) Close() error { return f.v.close() }

func (f *Flash) errorf(format string, args ...any) error {
	return fmt.Errorf("ubiflash: "+strconv.Quote(f.name)+": "+format, args...)
}

// LEB is one logical erase block of a dynamic volume, as an [ota.Flash]. Each WriteAt
// replaces the whole block atomically: after a power cut it holds what it held before,
// or all of what was written. This is the place for a copy of a boot record. It is
// safe for concurrent use.
type LEB struct {
	v    volume
	name string
	num  int32
	off  int64
	size int64

	mu sync.RWMutex
}

// OpenLEB opens block number num of the dynamic volume at path; see [Open] for paths.
// The kernel lets a volume be opened once to write (drivers/mtd/ubi/kapi.c,
// ubi_open_volume), so each LEB takes a volume of its own: a second one fails with
// EBUSY. A size of 0 means the whole block; less makes writes cheaper.
func OpenLEB(path string, num int, size int64) (*LEB, error) {
	v, err := openVolume(path, false)
	if err != nil {
		return nil, fmt.Errorf("ubiflash: %w", err)
	}
	l, err := newLEB(v, path, num, size)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ubiflash: %s: block %d: %w", strconv.Quote(path), num, err), v.close())
	}
	return l, nil
}

func newLEB(v volume, name string, num int, size int64) (*LEB, error) {
	info, err := v.info()
	switch {
	case err != nil:
		return nil, err
	case info.Static:
		return nil, fmt.Errorf("the volume is static: %w", ota.ErrInvalid)
	case info.Interrupted:
		return nil, ErrInterrupted
	case info.LEBSize <= 0 || info.LEBSize > math.MaxInt32:
		return nil, fmt.Errorf("blocks of %d bytes: %w", info.LEBSize, ota.ErrUnsupported)
	case num < 0 || int64(num) >= info.Size/info.LEBSize || num > math.MaxInt32:
		return nil, fmt.Errorf("the volume has %d: %w", info.Size/info.LEBSize, ota.ErrInvalid)
	case size < 0 || size > info.LEBSize:
		return nil, fmt.Errorf("%d bytes of %d: %w", size, info.LEBSize, ota.ErrInvalid)
	case size == 0:
		size = info.LEBSize
	}
	return &LEB{v: v, name: name, num: int32(num), off: int64(num) * info.LEBSize, size: size}, nil
}

// Size implements ota.Flash.
func (l *LEB) Size() int64 { return l.size }

// ReadAt implements io.ReaderAt. A block that was never written reads as 0xFF.
func (l *LEB) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, l.errorf("read at %d: %w", off, ota.ErrInvalid)
	}
	var eof error
	if rest := max(0, l.size-off); int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, eof
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	n, err := l.v.ReadAt(p, l.off+off)
	if n == len(p) {
		return n, eof
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, l.errorf("read of %d bytes at %d: %w", len(p), off, err)
}

// WriteAt implements io.WriterAt. It reads the block and replaces it; it is durable
// when it returns.
func (l *LEB) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case off < 0:
		return 0, l.errorf("write at %d: %w", off, ota.ErrInvalid)
	case off > l.size || int64(len(p)) > l.size-off:
		return 0, l.errorf("write of %d bytes at %d: outside of %d bytes: %w", len(p), off, l.size, ota.ErrTooLarge)
	case len(p) == 0:
		return 0, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	b := make([]byte, l.size)
	if int64(len(p)) < l.size {
		if n, err := l.v.ReadAt(b, l.off); n != len(b) {
			return 0, l.errorf("read before the write at %d: %w", off, errors.Join(io.ErrUnexpectedEOF, err))
		}
	}
	copy(b[off:], p)
	err := l.v.change(l.num, int32(l.size))
	if err == nil {
		var n int
		if n, err = l.v.Write(b); err == nil && n != len(b) {
			err = io.ErrShortWrite
		}
		if err != nil {
			err = errors.Join(err, l.v.reopen())
		}
	}
	if err != nil {
		return 0, l.errorf("write of %d bytes at %d: %w", len(p), off, err)
	}
	return len(p), nil
}

// Sync implements ota.Flash; see WriteAt.
func (l *LEB) Sync() error { return nil }

// Close closes the volume.
func (l *LEB) Close() error { return l.v.close() }

func (l *LEB) errorf(format string, args ...any) error {
	return fmt.Errorf("ubiflash: "+strconv.Quote(l.name)+": block "+strconv.Itoa(int(l.num))+": "+format, args...)
}

// Pair names two volumes that exchange their names.
type Pair struct{ A, B string }

// maxRename is how many volumes one renaming takes.
const maxRename = 32

// maxName is the length of a volume's name.
const maxName = 127

// Swap exchanges the names of the volumes of each pair, on the UBI device at path, such
// as /dev/ubi0: all of them in one step, which a power cut cannot divide. No volume
// may be in more than one pair, and there are at most 16.
func Swap(path string, pairs ...Pair) error {
	if err := swap(path, pairs); err != nil {
		return fmt.Errorf("ubiflash: %s: renaming: %w", strconv.Quote(path), err)
	}
	return nil
}

func swap(path string, pairs []Pair) error {
	if len(pairs) == 0 || 2*len(pairs) > maxRename {
		return fmt.Errorf("%d pairs: %w", len(pairs), ota.ErrInvalid)
	}
	seen := map[string]bool{}
	for _, p := range pairs {
		for _, n := range []string{p.A, p.B} {
			if n == "" || len(n) > maxName || seen[n] {
				return fmt.Errorf("name %s: empty, too long, or given twice: %w", ota.Quote(n), ota.ErrInvalid)
			}
			seen[n] = true
		}
	}
	return renameVolumes(path, pairs)
}
