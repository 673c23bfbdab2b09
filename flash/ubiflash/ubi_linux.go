package ubiflash

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/slotota/ota"
)

// sysfs is where UBI describes itself: torvalds/linux,
// Documentation/ABI/stable/sysfs-class-ubi.
const sysfs = "/sys/class/ubi"

// errBadVolume is what reads of a volume with a pending update return (drivers/mtd/
// ubi/kapi.c, ubi_leb_read).
var errBadVolume error = unix.EBADF

// device is the character device of a volume.
type device struct {
	f        *os.File
	path     string
	readOnly bool
	dir      string // in sysfs
}

// find returns the device of "ubi0:name", and a path as it is.
func find(sysfs, path string) (string, error) {
	dev, name, ok := strings.Cut(filepath.Base(path), ":")
	if !ok {
		return path, nil
	}
	vols, err := volumes(sysfs, dev)
	if err != nil {
		return "", err
	}
	v, ok := vols[name]
	if !ok {
		return "", fmt.Errorf("%s has no volume %s: %w", dev, ota.Quote(name), os.ErrNotExist)
	}
	return "/dev/" + dev + "_" + strconv.Itoa(int(v)), nil
}

// volumes returns the numbers of the volumes of a UBI device, by name.
func volumes(sysfs, dev string) (map[string]int32, error) {
	dirs, err := filepath.Glob(filepath.Join(sysfs, dev+"_*"))
	if err != nil {
		return nil, err
	}
	vols := map[string]int32{}
	for _, dir := range dirs {
		n, err := strconv.ParseInt(strings.TrimPrefix(filepath.Base(dir), dev+"_"), 10, 32)
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, "name"))
		if err != nil {
			return nil, err
		}
		vols[strings.TrimSuffix(string(b), "\n")] = int32(n)
	}
	return vols, nil
}

func openVolume(path string, readOnly bool) (volume, error) {
	path, err := find(sysfs, path)
	if err != nil {
		return nil, err
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	d := &device{path: path, readOnly: readOnly, dir: filepath.Join(sysfs, filepath.Base(real))}
	if _, err := os.Stat(filepath.Join(d.dir, "reserved_ebs")); err != nil {
		return nil, fmt.Errorf("%s: no volume of UBI: %w", strconv.Quote(path), errors.Join(ota.ErrInvalid, err))
	}
	return d, d.open()
}

func (d *device) open() (err error) {
	flag := os.O_RDWR
	if d.readOnly {
		flag = os.O_RDONLY
	}
	d.f, err = os.OpenFile(d.path, flag, 0)
	return err
}

func (d *device) reopen() error {
	if err := d.f.Close(); err != nil {
		return err
	}
	return d.open()
}

func (d *device) close() error { return d.f.Close() }

func (d *device) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

func (d *device) Write(p []byte) (int, error) { return d.f.Write(p) }

func (d *device) info() (i Info, err error) {
	var numbers [4]int64
	for k, name := range []string{"reserved_ebs", "usable_eb_size", "upd_marker", "corrupted"} {
		s, rerr := d.attr(name)
		if rerr == nil {
			numbers[k], rerr = strconv.ParseInt(s, 10, 64)
		}
		err = errors.Join(err, rerr)
	}
	kind, kerr := d.attr("type")
	name, nerr := d.attr("name")
	if err = errors.Join(err, kerr, nerr); err != nil {
		return i, err
	}
	if numbers[0] <= 0 || numbers[0] > 1<<31 || numbers[1] <= 0 || numbers[1] > 1<<31 {
		return i, fmt.Errorf("%d blocks of %d bytes: %w", numbers[0], numbers[1], ota.ErrInvalid)
	}
	return Info{
		Name: name, Size: numbers[0] * numbers[1], LEBSize: numbers[1], Static: kind == "static",
		Interrupted: numbers[2] != 0 || numbers[3] != 0,
	}, nil
}

func (d *device) attr(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(d.dir, name))
	return strings.TrimSpace(string(b)), err
}

func ioctl(f *os.File, req uint, arg unsafe.Pointer) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(arg))
		if e == 0 {
			return nil
		}
		if e != unix.EINTR {
			return e
		}
	}
}

func (d *device) update(bytes int64) error {
	return ioctl(d.f, unix.UBI_IOCVOLUP, unsafe.Pointer(&bytes))
}

// changeReq is struct ubi_leb_change_req.
type changeReq struct {
	lnum, bytes int32
	dtype       int8
	_           [7]int8
}

// dtype is what the kernel wants to see in a field that it does not use any more
// (include/uapi/mtd/ubi-user.h, "UBI_UNKNOWN").
const dtype = 3

func (d *device) change(lnum, n int32) error {
	return ioctl(d.f, unix.UBI_IOCEBCH, unsafe.Pointer(&changeReq{lnum: lnum, bytes: n, dtype: dtype}))
}

// renameReq is struct ubi_rnvol_req.
type renameReq struct {
	count int32
	_     [12]int8
	ents  [maxRename]struct {
		id  int32
		len int16
		_   [2]int8
		str [maxName + 1]byte
	}
}

func renameVolumes(path string, pairs []Pair) error {
	vols, err := volumes(sysfs, filepath.Base(path))
	if err != nil {
		return err
	}
	req, err := renaming(vols, pairs)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(ioctl(f, unix.UBI_IOCRNVOL, unsafe.Pointer(req)), f.Close())
}

func renaming(vols map[string]int32, pairs []Pair) (*renameReq, error) {
	req := &renameReq{}
	for _, p := range pairs {
		for _, n := range [][2]string{{p.A, p.B}, {p.B, p.A}} {
			id, ok := vols[n[0]]
			if !ok {
				return nil, fmt.Errorf("no volume %s: %w", ota.Quote(n[0]), os.ErrNotExist)
			}
			e := &req.ents[req.count]
			e.id, e.len = id, int16(len(n[1]))
			copy(e.str[:], n[1])
			req.count++
		}
	}
	return req, nil
}
