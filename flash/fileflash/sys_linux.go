package fileflash

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/slotota/ota"
)

// claim makes the opening of a block device fail with EBUSY if the kernel uses
// it, and a later mount fail while it is open: open(2), O_EXCL.
const claim = os.O_EXCL

func isBusy(err error) bool { return errors.Is(err, syscall.EBUSY) }

// allocate reserves space, where the file system can.
func allocate(f *os.File, size int64) error {
	err := error(syscall.EINTR)
	for errors.Is(err, syscall.EINTR) {
		err = syscall.Fallocate(int(f.Fd()), 0, 0, size)
	}
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		return nil
	}
	return err
}

// errNotDirect is what a write past the page cache fails with if the file system
// cannot do just this one.
const errNotDirect = syscall.EINVAL

// openDirect opens f once more, past the page cache. It returns nil if that cannot
// be done, or not be read from.
func openDirect(f *os.File, readOnly bool) handle {
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	// By its number, because another file may have its name by now.
	d, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), flag|syscall.O_DIRECT, 0)
	if err != nil {
		return nil
	}
	if n, err := d.ReadAt(aligned(pageSize), 0); n == 0 && err != nil {
		d.Close()
		return nil
	}
	return d
}

// control calls fn with the number of f.
func control(f *os.File, fn func(fd uintptr) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	errno := error(syscall.EINTR)
	for errors.Is(errno, syscall.EINTR) {
		if err := c.Control(func(fd uintptr) { errno = fn(fd) }); err != nil {
			return err
		}
	}
	return errno
}

// zero makes bytes of f zero.
func zero(f *os.File, block bool, off, n int64) error {
	err := control(f, func(fd uintptr) error {
		if !block {
			// FALLOC_FL_ZERO_RANGE and FALLOC_FL_KEEP_SIZE: the space stays reserved.
			return syscall.Fallocate(int(fd), 0x10|0x01, off, n)
		}
		// BLKZEROOUT: Linux, include/uapi/linux/fs.h, _IO(0x12, 127).
		request := uintptr(0x127f)
		if strings.HasPrefix(runtime.GOARCH, "mips") || strings.HasPrefix(runtime.GOARCH, "ppc") {
			request |= 1 << 29 // _IOC_NONE is not 0 there
		}
		span := [2]uint64{uint64(off), uint64(n)}
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(&span))); errno != 0 {
			return errno
		}
		return nil
	})
	for _, e := range []error{syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.ENOTTY, syscall.EINVAL} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ota.ErrUnsupported, err)
		}
	}
	return err
}

// dropCache makes the kernel forget what it has cached of f and has written already:
// posix_fadvise of all bytes with POSIX_FADV_DONTNEED, 4. Numbers and order of the
// arguments are those of the architecture's system call table; 0, 0 means all.
func dropCache(f *os.File) {
	_ = control(f, func(fd uintptr) error {
		switch runtime.GOARCH {
		case "amd64":
			syscall.Syscall6(221, fd, 0, 0, 4, 0, 0)
		case "arm64", "riscv64", "loong64":
			syscall.Syscall6(223, fd, 0, 0, 4, 0, 0)
		case "386":
			syscall.Syscall6(250, fd, 0, 0, 0, 4, 0)
		case "arm":
			syscall.Syscall6(270, fd, 4, 0, 0, 0, 0)
		}
		return nil
	})
}

// devno is a device number in the form "major:minor" of sysfs and mountinfo.
type devno string

// number formats a device number as the kernel encodes it: Linux,
// include/linux/kdev_t.h, new_encode_dev, and its 64-bit extension in libc.
func number(rdev uint64) devno {
	major := rdev>>8&0xfff | rdev>>32&^0xfff
	minor := rdev&0xff | rdev>>12&^0xff
	return devno(strconv.FormatUint(major, 10) + ":" + strconv.FormatUint(minor&0xffffffff, 10))
}

// device returns the number of the block device that info is about.
func device(info fs.FileInfo) (devno, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Mode&syscall.S_IFMT != syscall.S_IFBLK {
		return "", false
	}
	return number(uint64(st.Rdev)), true
}

// mounted returns an error that wraps ErrInUse if the file or block device is
// mounted, directly or by its relatives. proc and sys are where procfs and sysfs
// are.
func mounted(info fs.FileInfo, proc, sys string) error {
	var devs []devno
	if dev, ok := device(info); ok {
		devs = relatives(sys, dev)
	} else {
		devs = loops(sys, info)
	}
	if len(devs) == 0 {
		return nil
	}
	where, err := mountPoint(filepath.Join(proc, "self", "mountinfo"), devs)
	if err != nil {
		return err
	}
	if where != "" {
		return fmt.Errorf("mounted at %s: %w", ota.Quote(where), ErrInUse)
	}
	return nil
}

// relatives returns dev, the whole disk if dev is a partition, and the partitions
// if dev is a whole disk.
func relatives(sys string, dev devno) []devno {
	devs := []devno{dev}
	// A link into /sys/devices/…/block/sda or …/block/sda/sda1.
	dir, err := filepath.EvalSymlinks(filepath.Join(sys, "dev", "block", string(dev)))
	if err != nil {
		return devs // no sysfs: the claim must do
	}
	var others []string
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		others = []string{filepath.Dir(dir)}
	} else if parts, err := filepath.Glob(filepath.Join(dir, "*", "partition")); err == nil {
		for _, p := range parts {
			others = append(others, filepath.Dir(p))
		}
	}
	for _, d := range others {
		if b, err := os.ReadFile(filepath.Join(d, "dev")); err == nil {
			devs = append(devs, devno(bytes.TrimSpace(b)))
		}
	}
	return devs
}

// loops returns the loop devices whose backing file info is about, and their
// relatives.
func loops(sys string, info fs.FileInfo) []devno {
	files, err := filepath.Glob(filepath.Join(sys, "block", "loop*", "loop", "backing_file"))
	if err != nil {
		return nil
	}
	var devs []devno
	for _, name := range files {
		path, err := os.ReadFile(name)
		if err != nil {
			continue // detached meanwhile
		}
		back, err := os.Stat(strings.TrimSuffix(string(path), "\n"))
		if err != nil || !os.SameFile(info, back) {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(filepath.Dir(name), "..", "dev")); err == nil {
			devs = append(devs, relatives(sys, devno(bytes.TrimSpace(b)))...)
		}
	}
	return devs
}

// mountPoint returns where one of devs is mounted, "" if nowhere. The format is
// that of proc_pid_mountinfo(5):
//
//	36 35 98:0 /root /mount\040point rw,noatime shared:1 - ext3 /dev/root rw
func mountPoint(mountinfo string, devs []devno) (string, error) {
	f, err := os.Open(mountinfo)
	if err != nil {
		return "", fmt.Errorf("is it mounted? %w", err)
	}
	defer f.Close()
	// Overlay mounts have lines of many paths.
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), " ")
		head := fields
		source := ""
		for i, s := range fields {
			if s == "-" && i >= 6 {
				if head = fields[:i]; i+2 < len(fields) {
					source = unescape(fields[i+2])
				}
				break
			}
		}
		if len(head) == len(fields) {
			return "", fmt.Errorf("%s: line %s: %w", mountinfo, ota.Quote(lines.Text()), ota.ErrInvalid)
		}
		// btrfs shows a number that is no device's; its source is one.
		var bySource devno
		if strings.HasPrefix(source, "/") {
			if info, err := os.Stat(source); err == nil {
				bySource, _ = device(info)
			}
		}
		for _, dev := range devs {
			if devno(head[2]) == dev || bySource == dev {
				return unescape(head[4]), nil
			}
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("%s: %w", mountinfo, err)
	}
	return "", nil
}

// unescape undoes the \ooo of mountinfo, which stands for space, tab, newline and
// backslash.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
