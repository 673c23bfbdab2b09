package mtdflash

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/slotota/ota"
)

// device is an MTD character device.
type device struct{ *os.File }

func openMTD(path string, readOnly bool) (mtd, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode()&os.ModeCharDevice == 0 {
		return nil, fmt.Errorf("%s: no character device: %w", strconv.Quote(path), ota.ErrInvalid)
	}
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	return &device{f}, nil
}

// errIO is the error of a program or erase operation that failed in the chip.
var errIO error = unix.EIO

// ioctl numbers and structures are those of the architecture, from package unix.
func (d *device) ioctl(req uint, arg unsafe.Pointer) (int, error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_IOCTL, d.Fd(), uintptr(req), uintptr(arg))
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		case unix.EOPNOTSUPP, unix.ENOTTY, enotsupp:
			return 0, fmt.Errorf("%w: %w", errNotSupported, e)
		}
		return 0, e
	}
}

// enotsupp is an error of the kernel that has no name for programs: ENOTSUPP of
// include/linux/errno.h, returned by MEMUNLOCK for example.
const enotsupp = unix.Errno(524)

func (d *device) info() (Info, error) {
	var mi unix.MtdInfo
	if _, err := d.ioctl(unix.MEMGETINFO, unsafe.Pointer(&mi)); err != nil {
		return Info{}, fmt.Errorf("MEMGETINFO: %w", err)
	}
	i := Info{
		Kind: Kind(mi.Type), Size: int64(mi.Size), EraseSize: int64(mi.Erasesize), WriteSize: int64(mi.Writesize),
		Writable: mi.Flags&unix.MTD_WRITEABLE != 0,
	}
	// The size has 32 bits; sysfs has all of them.
	if size, ok := d.sysfsSize(); ok {
		i.Size = size
	} else if mi.Size == 0 {
		return Info{}, fmt.Errorf("size unknown: %w", ota.ErrUnsupported)
	}
	return i, nil
}

func (d *device) sysfsSize() (int64, bool) {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil {
		return 0, false
	}
	rdev := uint64(st.Rdev)
	dir := strconv.Itoa(int(unix.Major(rdev))) + ":" + strconv.Itoa(int(unix.Minor(rdev)))
	b, err := os.ReadFile(filepath.Join("/sys/dev/char", dir, "size"))
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil && n > 0
}

func (d *device) failures() (uint32, error) {
	var s unix.MtdEccStats
	_, err := d.ioctl(unix.ECCGETSTATS, unsafe.Pointer(&s))
	return s.Failed, err
}

func (d *device) erase(off, n int64) error {
	e := unix.EraseInfo64{Start: uint64(off), Length: uint64(n)}
	_, err := d.ioctl(unix.MEMERASE64, unsafe.Pointer(&e))
	return err
}

func (d *device) isBad(off int64) (bool, error) {
	n, err := d.ioctl(unix.MEMGETBADBLOCK, unsafe.Pointer(&off))
	return n != 0, err
}

func (d *device) markBad(off int64) error {
	_, err := d.ioctl(unix.MEMSETBADBLOCK, unsafe.Pointer(&off))
	return err
}

// range32 is the argument of the ioctls for locks, which have 32 bits only.
func range32(off, n int64) (*unix.EraseInfo, error) {
	if off < 0 || n < 0 || off > math.MaxUint32 || n > math.MaxUint32 {
		return nil, fmt.Errorf("lock of %d bytes at %d: %w", n, off, errNotSupported)
	}
	return &unix.EraseInfo{Start: uint32(off), Length: uint32(n)}, nil
}

func (d *device) isLocked(off, n int64) (bool, error) {
	e, err := range32(off, n)
	if err != nil {
		return false, err
	}
	k, err := d.ioctl(unix.MEMISLOCKED, unsafe.Pointer(e))
	return k != 0, err
}

func (d *device) lock(off, n int64, locked bool) error {
	e, err := range32(off, n)
	if err != nil {
		return err
	}
	req := uint(unix.MEMUNLOCK)
	if locked {
		req = unix.MEMLOCK
	}
	_, err = d.ioctl(req, unsafe.Pointer(e))
	return err
}

func (d *device) close() error { return d.Close() }
