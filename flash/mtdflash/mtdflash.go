// Package mtdflash is raw flash behind Linux's MTD layer: NOR, and NAND with bad
// blocks. For UBI volumes see flash/ubiflash; a UBI on top is what NAND should
// have, this package is for what a boot loader reads without it.
//
// # NAND
//
// Bad blocks are skipped, as U-Boot's "nand read" and nandwrite do: byte 0 of a
// [Flash] is the first byte of the first good block, and the bad ones in between do
// not exist. Nothing else is recorded anywhere, so that every reader that skips
// bad blocks finds the same bytes. Before each write the driver is asked again
// whether the block is bad, because it lets a write to a bad block succeed.
//
// A block that cannot be erased is marked bad and left out; the erase goes on with
// the next good one, and everything behind moves by one block. Blocks behind the
// erased range are then found at another place: if any of them was written since Open,
// Erase says so, once, with [ErrMoved], and the update must begin again. A block that cannot be written is marked bad too, and the write
// fails with [ErrBadBlock]; the next attempt, which starts with an erase, does
// without it. An update that fails so is repeated as after a power cut.
//
// Size is smaller than the device by a reserve for blocks that become bad, and
// does not change when they do.
//
// Give each part of a slot an MTD partition, or an [Options] Offset and Length, of
// its own: in an ota.Region of a NAND Flash the neighbours would move with it.
package mtdflash

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"sync"

	"github.com/slotota/ota"
)

var (
	// ErrBadBlock is wrapped by the error of a write that met a block which is
	// or became bad.
	ErrBadBlock = errors.New("bad block")
	// ErrMoved is wrapped by the error of an Erase that found a bad block in front
	// of what was written since Open.
	ErrMoved = errors.New("a block has become bad, and what was written behind it has moved")
	// ErrWorn is wrapped by the errors of all access to what lies behind the last
	// good block, once more blocks are bad than the reserve had. What lies in front
	// of it can still be read, and started.
	ErrWorn = errors.New("too many bad blocks")
	// ErrECC is wrapped by the error of a read that has more wrong bits than could
	// be corrected.
	ErrECC = errors.New("uncorrectable bit errors")
)

// Kind is what is behind the MTD layer; include/uapi/mtd/mtd-abi.h.
type Kind uint8

// The kinds.
const (
	RAM       Kind = 1
	ROM       Kind = 2
	NOR       Kind = 3
	NAND      Kind = 4
	DataFlash Kind = 6
	UBIVolume Kind = 7
	MLCNAND   Kind = 8
)

// String returns a word for k.
func (k Kind) String() string {
	switch k {
	case RAM:
		return "RAM"
	case ROM:
		return "ROM"
	case NOR:
		return "NOR"
	case NAND:
		return "NAND"
	case DataFlash:
		return "DataFlash"
	case UBIVolume:
		return "UBI volume"
	case MLCNAND:
		return "MLC NAND"
	}
	return "kind " + strconv.Itoa(int(k))
}

func (k Kind) nand() bool { return k == NAND || k == MLCNAND }

// Info is what the driver tells about a device.
type Info struct {
	Kind Kind
	// Size is that of the device, EraseSize that of an erase block, WriteSize that
	// of a page: bytes.
	Size, EraseSize, WriteSize int64
	// Writable says that the driver allows writes.
	Writable bool
}

// Options configure [Open]. The zero value opens the whole device.
type Options struct {
	// Offset and Length limit the Flash to a part of the device that begins with an
	// erase block; Length is rounded up to whole ones, and 0 means up to the end. A
	// bad block never makes it go beyond.
	Offset, Length int64
	// Size is the size of the Flash, rounded up to whole erase blocks; what remains
	// of Length is the reserve for bad blocks. 0 means Length without a reserve of
	// 20 blocks in 1024, at least one, on NAND (what UBI keeps, too), and all of
	// Length elsewhere.
	Size int64
	// ReadOnly refuses all writes.
	ReadOnly bool
}

// mtd is what the kernel does.
type mtd interface {
	io.ReaderAt
	io.WriterAt
	info() (Info, error)
	// failures counts the uncorrectable errors of all reads so far.
	failures() (uint32, error)
	erase(off, n int64) error
	isBad(off int64) (bool, error)
	markBad(off int64) error
	isLocked(off, n int64) (bool, error)
	lock(off, n int64, locked bool) error
	close() error
}

// errNotSupported is what mtd returns for what a driver cannot do.
var errNotSupported = errors.New("not supported by the driver")

// Flash is an [ota.Flash], [ota.Eraser] and [ota.WriteSizer]. It is safe for concurrent
// use.
type Flash struct {
	m        mtd
	name     string
	info     Info
	size     int64
	readOnly bool

	mu     sync.RWMutex   // write-locked while blocks move; guards what follows
	blocks []int64        // offset on the device of each good block, reserve included
	used   map[int64]bool // blocks written since they were last erased here, by offset on the device
	closed bool
	relock map[int64]bool // blocks found locked

	ecc sync.Mutex // serializes reads, whose failures are counted
}

// Open opens the MTD character device at path, such as /dev/mtd3; it needs Linux.
// The error wraps ota.ErrInvalid if Options do not fit it. A device with too many bad
// blocks is opened all the same, so that the firmware in it, and beside it, can be
// started; see [ErrWorn]. o may be nil.
func Open(path string, o *Options) (*Flash, error) {
	if o == nil {
		o = &Options{}
	}
	m, err := openMTD(path, o.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("mtdflash: %w", err)
	}
	f, err := newFlash(m, path, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mtdflash: %s: %w", strconv.Quote(path), err), m.close())
	}
	return f, nil
}

func newFlash(m mtd, name string, o *Options) (*Flash, error) {
	info, err := m.info()
	if err != nil {
		return nil, err
	}
	es := info.EraseSize
	switch {
	case info.Kind == UBIVolume:
		return nil, fmt.Errorf("a UBI volume; use package ubiflash: %w", ota.ErrUnsupported)
	case es <= 0 || info.WriteSize <= 0 || es%info.WriteSize != 0 || info.Size <= 0 || info.Size/es > math.MaxInt32:
		return nil, fmt.Errorf("geometry %+v: %w", info, ota.ErrUnsupported)
	case o.Offset < 0 || o.Offset%es != 0 || o.Offset >= info.Size || o.Length < 0 || o.Length > info.Size-o.Offset || o.Size < 0 || o.Size > info.Size:
		return nil, fmt.Errorf("%d of %d bytes at %d, in %d of blocks of %d: %w", o.Size, o.Length, o.Offset, info.Size, es, ota.ErrInvalid)
	case !o.ReadOnly && !info.Writable:
		return nil, fmt.Errorf("%v: %w", info.Kind, ota.ErrReadOnly)
	}
	length := roundUp(o.Length, es)
	if length == 0 {
		length = info.Size - o.Offset
	}
	size := roundUp(o.Size, es)
	if length%es != 0 || length > info.Size-o.Offset || size > length {
		return nil, fmt.Errorf("size %d of %d at %d, in %d of blocks of %d: %w", size, length, o.Offset, info.Size, es, ota.ErrInvalid)
	}
	f := &Flash{m: m, name: name, info: info, size: size, readOnly: o.ReadOnly, used: map[int64]bool{}, relock: map[int64]bool{}}
	if f.size == 0 {
		f.size = length
		if info.Kind.nand() {
			f.size -= reserve(length/es) * es
		}
	}
	for off := o.Offset; off < o.Offset+length; off += es {
		bad, err := f.bad(off)
		if err != nil {
			return nil, err
		}
		if !bad {
			f.blocks = append(f.blocks, off)
		}
	}
	if f.size <= 0 {
		return nil, fmt.Errorf("%d bytes leave nothing beside the reserve: %w", length, ota.ErrInvalid)
	}
	return f, nil
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// reserve is how many of n blocks may become bad.
func reserve(n int64) int64 { return max(1, (n*20+1023)/1024) }

// bad reports whether the block at off on the device is bad.
func (f *Flash) bad(off int64) (bool, error) {
	if !f.info.Kind.nand() {
		return false, nil
	}
	bad, err := f.m.isBad(off)
	if errors.Is(err, errNotSupported) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("is the block at %d bad? %w", off, err)
	}
	return bad, nil
}

// Info returns what the driver tells about the device.
func (f *Flash) Info() Info { return f.info }

// Spare returns how many more blocks may become bad. It is negative if there are too
// many already: as many blocks at the end of the Flash are lost, see [ErrWorn].
func (f *Flash) Spare() int {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return len(f.blocks) - int(f.size/f.info.EraseSize)
}

// Size implements ota.Flash.
func (f *Flash) Size() int64 { return f.size }

// EraseSize implements ota.Eraser.
func (f *Flash) EraseSize() int64 { return f.info.EraseSize }

// WriteSize implements ota.WriteSizer: the page of NAND. Parts of pages are not
// written, even where the chip could: the error correction covers whole pages.
func (f *Flash) WriteSize() int64 { return f.info.WriteSize }

func (f *Flash) worn() error {
	return fmt.Errorf("%d bytes in good blocks, need %d: %w", int64(len(f.blocks))*f.info.EraseSize, f.size, ErrWorn)
}

// each calls do for each piece of the n bytes at off, with its place on the device.
func (f *Flash) each(off, n int64, do func(dev, at, n int64) error) error {
	es := f.info.EraseSize
	for at := int64(0); at < n; {
		k, in := (off+at)/es, (off+at)%es
		m := min(es-in, n-at)
		if k >= int64(len(f.blocks)) {
			return f.worn()
		}
		if err := do(f.blocks[k]+in, at, m); err != nil {
			return err
		}
		at += m
	}
	return nil
}

// ReadAt implements io.ReaderAt. Uncorrectable bits of NAND give an error that wraps
// [ErrECC], although the kernel's read succeeds; so may those of another program's
// read at the same time.
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
	read := f.read
	if f.info.Kind.nand() {
		read = f.readECC
	}
	done := 0
	err := f.each(off, int64(len(p)), func(dev, at, n int64) error {
		k, err := read(p[at:at+n], dev)
		done += k
		return err
	})
	if err != nil {
		return done, f.errorf("read of %d bytes at %d: %w", len(p), off, err)
	}
	return done, eof
}

func (f *Flash) read(p []byte, dev int64) (int, error) {
	n, err := f.m.ReadAt(p, dev)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// readECC reads and asks whether the error correction has failed meanwhile: read(2)
// of an MTD device returns the bytes all the same (torvalds/linux,
// drivers/mtd/mtdchar.c, mtdchar_read).
func (f *Flash) readECC(p []byte, dev int64) (int, error) {
	f.ecc.Lock()
	defer f.ecc.Unlock()
	before, err := f.m.failures()
	if errors.Is(err, errNotSupported) {
		return f.read(p, dev)
	}
	if err != nil {
		return 0, err
	}
	n, err := f.read(p, dev)
	if err != nil {
		return n, err
	}
	after, err := f.m.failures()
	if err == nil && after != before {
		err = fmt.Errorf("on the device at %d: %w", dev, ErrECC)
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// inside refuses what is not whole units of the flash.
func (f *Flash) inside(what string, off, n, unit int64) error {
	switch {
	case f.readOnly:
		return f.errorf("%s at %d: %w", what, off, ota.ErrReadOnly)
	case off < 0 || n < 0 || off%unit != 0 || n%unit != 0:
		return f.errorf("%s of %d bytes at %d: not in units of %d: %w", what, n, off, unit, ota.ErrInvalid)
	case off > f.size || n > f.size-off:
		return f.errorf("%s of %d bytes at %d: outside of %d bytes: %w", what, n, off, f.size, ota.ErrTooLarge)
	}
	return nil
}

// WriteAt implements io.WriterAt, in units of WriteSize. It returns when the chip
// has programmed the bytes.
func (f *Flash) WriteAt(p []byte, off int64) (int, error) {
	if err := f.inside("write", off, int64(len(p)), f.info.WriteSize); err != nil || len(p) == 0 {
		return 0, err
	}
	if f.info.Kind.nand() {
		// Exclusive, because a block may turn out to be bad.
		f.mu.Lock()
		defer f.mu.Unlock()
	} else {
		f.mu.RLock()
		defer f.mu.RUnlock()
	}
	done := 0
	err := f.each(off, int64(len(p)), func(dev, at, n int64) error {
		block := dev - dev%f.info.EraseSize
		if f.info.Kind.nand() {
			if bad, err := f.bad(block); err != nil {
				return err
			} else if bad {
				f.drop(block)
				return fmt.Errorf("block at %d on the device: %w", block, ErrBadBlock)
			}
			f.used[block] = true
		}
		k, err := f.m.WriteAt(p[at:at+n], dev)
		done += max(k, 0)
		if err == nil && int64(k) != n {
			err = io.ErrShortWrite
		}
		if err != nil && f.info.Kind.nand() && errors.Is(err, errIO) {
			return errors.Join(fmt.Errorf("block at %d on the device: %w: %w", block, ErrBadBlock, err), f.retire(block))
		}
		return err
	})
	if err != nil {
		return done, f.errorf("write of %d bytes at %d: %w", len(p), off, err)
	}
	return done, nil
}

// retire marks a block bad.
func (f *Flash) retire(block int64) error {
	if err := f.m.markBad(block); err != nil {
		return fmt.Errorf("marking the block at %d bad: %w", block, err)
	}
	f.drop(block)
	return nil
}

// drop takes a block out of the mapping, as it is not in that of the next reader.
func (f *Flash) drop(block int64) {
	f.blocks = slices.DeleteFunc(f.blocks, func(off int64) bool { return off == block })
}

// Erase implements ota.Eraser. On NAND, blocks that cannot be erased are marked bad
// and left out; see the package documentation.
func (f *Flash) Erase(off, n int64) error {
	if err := f.inside("erase", off, n, f.info.EraseSize); err != nil || n == 0 {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	moved := false
	for k, end := off/f.info.EraseSize, (off+n)/f.info.EraseSize; k < end; {
		if k >= int64(len(f.blocks)) {
			return f.errorf("erase of %d bytes at %d: %w", n, off, f.worn())
		}
		block := f.blocks[k]
		ok, err := f.eraseBlock(block)
		if err != nil {
			return f.errorf("erase of the block at %d on the device: %w", block, err)
		}
		if ok {
			k++
			continue
		}
		moved = moved || f.usedBehind(block, end)
		f.drop(block)
	}
	if moved {
		clear(f.used) // it is said once
		return f.errorf("erase of %d bytes at %d: %w", n, off, ErrMoved)
	}
	return nil
}

// usedBehind reports whether a block from number k on, and behind block, was written
// since it was last erased.
func (f *Flash) usedBehind(block int64, k int64) bool {
	for _, b := range f.blocks[min(k, int64(len(f.blocks))):] {
		if b > block && f.used[b] {
			return true
		}
	}
	return false
}

// eraseBlock erases a block, and reports whether it is good.
func (f *Flash) eraseBlock(block int64) (bool, error) {
	if bad, err := f.bad(block); bad || err != nil {
		return false, err
	}
	es := f.info.EraseSize
	if err := f.unlock(block, es); err != nil {
		return false, err
	}
	err := f.m.erase(block, es)
	switch {
	case err == nil:
		delete(f.used, block)
		return true, nil
	case f.info.Kind.nand() && errors.Is(err, errIO):
		if merr := f.m.markBad(block); merr != nil {
			return false, errors.Join(err, fmt.Errorf("marking it bad: %w", merr))
		}
		return false, nil
	}
	return false, err
}

// unlock removes the write protection of a block, and remembers that it had one.
func (f *Flash) unlock(off, n int64) error {
	if f.info.Kind.nand() {
		return nil
	}
	locked, err := f.m.isLocked(off, n)
	if errors.Is(err, errNotSupported) {
		// Drivers that cannot tell may still have it: all blocks after power-up.
		if err := f.m.lock(off, n, false); err != nil && !errors.Is(err, errNotSupported) {
			return fmt.Errorf("unlock: %w", err)
		}
		return nil
	}
	if err != nil || !locked {
		return err
	}
	if err := f.m.lock(off, n, false); err != nil {
		return fmt.Errorf("unlock: %w", err)
	}
	f.relock[off] = true
	return nil
}

// Sync implements ota.Flash. Writes and erases of MTD devices are complete when
// they return.
func (f *Flash) Sync() error { return nil }

// Close closes the device, and protects the blocks again that were protected.
func (f *Flash) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	var errs []error
	for off := range f.relock {
		if err := f.m.lock(off, f.info.EraseSize, true); err != nil {
			errs = append(errs, f.errorf("lock of the block at %d on the device: %w", off, err))
		}
	}
	return errors.Join(append(errs, f.m.close())...)
}

func (f *Flash) errorf(format string, args ...any) error {
	return fmt.Errorf("mtdflash: "+strconv.Quote(f.name)+": "+format, args...)
}
