package fileflash

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

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
