// Package fileflash is flash in regular files and block devices: partitions of
// eMMC and disks on embedded Linux, image files elsewhere.
//
// [Open] guards what it opens. On Linux it refuses to write to what is mounted,
// be it the block device itself, the disk around it, a partition inside it, or a
// file that is mounted through a loop device, and it claims block devices
// (O_EXCL), so that nobody can mount them later. On Unix it locks what it
// writes to (flock), so that two updaters cannot share a slot. A device's
// running slot is normally mounted; [Options.ReadOnlyIfMounted] lets the same
// program open all slots alike.
//
// On Linux, whole aligned blocks are written past the page cache (O_DIRECT) if the
// file system allows it, and read back past it: [File.DirectReader] asks the medium.
// Where it does not, Sync makes the system forget what it has cached of the file
// (posix_fadvise), so that the next read asks the medium, as far as the system
// heeds that. Elsewhere reading back what was just written proves that it was handed
// to the system, and, after Sync, that the medium has acknowledged it, not that the
// medium can still read it.
//
// Block devices need Linux; regular files work everywhere Go does.
package fileflash

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"unsafe"

	"github.com/slotota/ota"
)

// ErrInUse is wrapped by the errors of [Open] for what is mounted, claimed by
// the kernel, or open for writing elsewhere.
var ErrInUse = errors.New("in use")

// sectorSize is the unit that the sizes of block devices are multiples of.
const sectorSize = 512

// Options configure [Open]. The zero value opens what exists, to read and write.
type Options struct {
	// Size is the size in bytes that the file or device must have, if not 0.
	Size int64
	// Create makes a regular file of Size bytes, zeros, if there is nothing at
	// path. A power cut leaves either no file or the whole one.
	Create bool
	// Perm is what Create gives the file, before the umask; 0 means 0600.
	Perm fs.FileMode
	// ReadOnly refuses all writes. Nothing is locked or claimed then, and what
	// is mounted can be opened.
	ReadOnly bool
	// ReadOnlyIfMounted is like ReadOnly for what is mounted or claimed by the
	// kernel in another way (device mapper, swap), and has no effect on
	// anything else.
	ReadOnlyIfMounted bool
}

// File is an [ota.Flash] in a file or block device. Its methods are safe for
// concurrent use.
type File struct {
	f        *os.File
	direct   handle // the same file past the page cache, or nil
	block    bool
	name     string
	size     int64
	readOnly bool
	sync     func() error
	failed   atomic.Pointer[error] // of the first Sync that failed
}

// handle is what direct needs of an *os.File.
type handle interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
}

// Open opens the regular file or block device at path; a symbolic link is
// followed. The size is found out once and stays. Errors wrap [ErrInUse], those of
// package os, or ota.ErrInvalid if there is something at path that cannot serve:
// of the wrong kind or size, empty, or a device with a size that is not a
// multiple of 512. o may be nil.
func Open(path string, o *Options) (*File, error) {
	if o == nil {
		o = &Options{}
	}
	f, err := open(path, o)
	if err != nil {
		return nil, fmt.Errorf("fileflash: open %s: %w", strconv.Quote(path), err)
	}
	return f, nil
}

func open(path string, o *Options) (*File, error) {
	if o.Size < 0 || o.Create && o.Size == 0 {
		return nil, fmt.Errorf("size %d: %w", o.Size, ota.ErrInvalid)
	}
	if o.Create && o.ReadOnly {
		return nil, fmt.Errorf("to be created, but read-only: %w", ota.ErrInvalid)
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) && o.Create {
		if err := create(path, o); err != nil {
			return nil, err
		}
		info, err = os.Stat(path)
	}
	if err != nil {
		return nil, err
	}
	// Before it is opened, because opening may block (FIFO) or act (tape).
	block, err := isBlock(info)
	if err != nil {
		return nil, err
	}

	readOnly := o.ReadOnly
	if !readOnly {
		switch err := mounted(info, "/proc", "/sys"); {
		case errors.Is(err, ErrInUse) && o.ReadOnlyIfMounted:
			readOnly = true
		case err != nil:
			return nil, err
		}
	}
	f, err := openFile(path, block, readOnly)
	if errors.Is(err, ErrInUse) && o.ReadOnlyIfMounted {
		readOnly = true
		f, err = openFile(path, block, readOnly)
	}
	if err != nil {
		return nil, err
	}
	size, err := examine(f, info, block, readOnly, o.Size)
	if err != nil {
		f.Close()
		return nil, err
	}
	file := &File{f: f, direct: openDirect(f, readOnly), block: block, name: path, size: size, readOnly: readOnly}
	file.sync = func() error {
		err := f.Sync()
		if err == nil && file.direct == nil {
			dropCache(f)
		}
		return err
	}
	return file, nil
}

func isBlock(info fs.FileInfo) (bool, error) {
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return false, nil
	case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		return true, nil
	default:
		return false, fmt.Errorf("neither a regular file nor a block device, but %s: %w", mode, ota.ErrInvalid)
	}
}

func openFile(path string, block, readOnly bool) (*os.File, error) {
	flag := os.O_RDONLY
	if !readOnly {
		flag = os.O_RDWR
		if block {
			flag |= claim
		}
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil && isBusy(err) {
		return nil, fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return f, err
}

// examine checks that f is what info was about, locks it, and returns its size.
func examine(f *os.File, info fs.FileInfo, block, readOnly bool, want int64) (int64, error) {
	now, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !os.SameFile(info, now) {
		return 0, fmt.Errorf("replaced while it was opened: %w", ErrInUse)
	}
	if !readOnly {
		if err := lock(f); err != nil {
			return 0, err
		}
	}
	size, err := f.Seek(0, io.SeekEnd) // a block device has no size in its Stat
	switch {
	case err != nil:
		return 0, err
	case size == 0:
		return 0, fmt.Errorf("empty: %w", ota.ErrInvalid)
	case block && size%sectorSize != 0:
		return 0, fmt.Errorf("%d bytes: not whole sectors: %w", size, ota.ErrInvalid)
	case want != 0 && size != want:
		return 0, fmt.Errorf("%d bytes, not %d: %w", size, want, ota.ErrInvalid)
	}
	return size, nil
}

// create makes a file under another name, and gives it its own when it is whole.
func create(path string, o *Options) (err error) {
	perm := o.Perm
	if perm == 0 {
		perm = 0o600
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	if err = f.Truncate(o.Size); err == nil {
		// An update must not find out half-way that the disk is full.
		err = allocate(f, o.Size)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	// A link never replaces a file that someone else has made by now; not every
	// file system has links.
	if err := os.Link(tmp, path); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		if err := os.Rename(tmp, path); err != nil {
			return err
		}
		// On FAT the new name leads to the content only after this.
		if err := syncPath(path); err != nil {
			return err
		}
	}
	return syncPath(filepath.Dir(path))
}

// Size returns the size in bytes.
func (f *File) Size() int64 { return f.size }

// ReadOnly reports whether writes are refused.
func (f *File) ReadOnly() bool { return f.readOnly }

// IOSize implements [ota.IOSizer].
func (f *File) IOSize() int64 { return ioSize }

// ioSize is what reads and writes past the page cache are fast with.
const ioSize = 512 << 10

// pageSize is what they must be aligned to, more than any file system asks for.
const pageSize = 4096

// ReadAt implements io.ReaderAt. If the file has become shorter since it was
// opened, the error wraps io.ErrUnexpectedEOF.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.readAt(f.f, p, off) }

func (f *File) readAt(from io.ReaderAt, p []byte, off int64) (int, error) {
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
	n, err := from.ReadAt(p, off)
	if n == len(p) {
		return n, eof
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, f.errorf("read of %d bytes at %d: %w", len(p), off, err)
}

// DirectReader implements [ota.DirectReader]. It returns nil where the page cache
// cannot be gone round.
func (f *File) DirectReader() io.ReaderAt {
	if f.direct == nil {
		return nil
	}
	return directReader{f}
}

type directReader struct{ f *File }

func (d directReader) ReadAt(p []byte, off int64) (int, error) {
	return d.f.readAt(unaligned{d.f.direct}, p, off)
}

// unaligned reads what is not aligned through memory that is.
type unaligned struct{ f io.ReaderAt }

func (u unaligned) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && err == nil {
		at := off + int64(n)
		rest := p[n:]
		var k int
		if at%pageSize == 0 && len(rest) >= pageSize && isAligned(rest) {
			k, err = u.f.ReadAt(rest[:len(rest)&^(pageSize-1)], at)
		} else {
			// One page, or up to the first one of rest.
			page := aligned(min(len(rest)+2*pageSize, 16*pageSize) &^ (pageSize - 1))
			skip := int(at % pageSize)
			if k, err = u.f.ReadAt(page, at-int64(skip)); k > skip {
				k = copy(rest, page[skip:k])
				err = nil // that of a read beyond the end
			} else {
				k = 0
			}
		}
		n += k
	}
	return n, err
}

// isAligned reports whether p begins on a page.
func isAligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%pageSize == 0
}

// aligned returns n bytes that begin on a page.
func aligned(n int) []byte {
	b := make([]byte, n+pageSize)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) % pageSize)
	return b[skip : skip+n]
}

// WriteAt implements io.WriterAt. It never makes the file longer: what does not
// fit is refused as a whole, with an error that wraps ota.ErrTooLarge. After a
// failed Sync it does nothing.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case f.readOnly:
		return 0, f.errorf("write at %d: %w", off, ota.ErrReadOnly)
	case off < 0:
		return 0, f.errorf("write at %d: %w", off, ota.ErrInvalid)
	case off > f.size || int64(len(p)) > f.size-off:
		return 0, f.errorf("write of %d bytes at %d: outside of %d bytes: %w", len(p), off, f.size, ota.ErrTooLarge)
	}
	if err := f.failed.Load(); err != nil {
		return 0, f.errorf("write at %d: an earlier sync failed: %w", off, *err)
	}
	n, err := f.writeAt(p, off)
	if err != nil {
		err = f.errorf("write of %d bytes at %d: %w", len(p), off, err)
	}
	return n, err
}

// writeAt writes whole pages past the cache if it can, and the rest through it. The
// system keeps the two in step.
func (f *File) writeAt(p []byte, off int64) (n int, err error) {
	if whole := len(p) &^ (pageSize - 1); whole > 0 && f.direct != nil && off%pageSize == 0 && isAligned(p) {
		n, err = f.direct.WriteAt(p[:whole], off)
		if err != nil && !errors.Is(err, errNotDirect) {
			return n, err
		}
	}
	if n == len(p) {
		return n, nil
	}
	m, err := f.f.WriteAt(p[n:], off+int64(n))
	return n + m, err
}

// Zero implements [ota.Zeroer], for whole sectors: by BLKZEROOUT in block devices,
// by fallocate in files, which both write the zeros where the medium has no better
// way.
func (f *File) Zero(off, n int64) error {
	switch {
	case f.readOnly:
		return f.errorf("zeroing at %d: %w", off, ota.ErrReadOnly)
	case off < 0 || n < 0:
		return f.errorf("zeroing at %d: %w", off, ota.ErrInvalid)
	case off > f.size || n > f.size-off:
		return f.errorf("zeroing %d bytes at %d: outside of %d bytes: %w", n, off, f.size, ota.ErrTooLarge)
	case (off|n)%sectorSize != 0:
		return ota.ErrUnsupported
	case n == 0:
		return nil
	}
	if err := f.failed.Load(); err != nil {
		return f.errorf("zeroing at %d: an earlier sync failed: %w", off, *err)
	}
	err := zero(f.f, f.block, off, n)
	if err != nil && !errors.Is(err, ota.ErrUnsupported) {
		return f.errorf("zeroing %d bytes at %d: %w", n, off, err)
	}
	return err
}

// Sync makes everything written durable (fsync). Once it has failed, it and
// WriteAt keep failing until the file is opened anew: the system may have
// dropped what it could not write, and would report success the next time.
func (f *File) Sync() error {
	if f.readOnly {
		return nil
	}
	if err := f.failed.Load(); err != nil {
		return f.errorf("an earlier sync failed: %w", *err)
	}
	if err := f.sync(); err != nil {
		f.failed.CompareAndSwap(nil, &err)
		return f.errorf("sync: %w", err)
	}
	// A sync that ran beside a failed one may have been told nothing.
	if err := f.failed.Load(); err != nil {
		return f.errorf("another sync failed: %w", *err)
	}
	return nil
}

// Close closes the file and gives up lock and claim. It does not sync.
func (f *File) Close() error {
	if f.direct != nil {
		f.direct.Close() // which has nothing to lose
	}
	return f.f.Close()
}

func (f *File) errorf(format string, args ...any) error {
	return fmt.Errorf("fileflash: "+strconv.Quote(f.name)+": "+format, args...)
}
