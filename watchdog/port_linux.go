package watchdog

import (
	"bytes"
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// device is a character device of the kernel's watchdog core. It is kept out of
// the poller, which has nothing to wait for.
type device struct{ f *os.File }

func openPort(path string) (port, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &device{f}, nil
}

func (d *device) ioctl(req uint, arg unsafe.Pointer) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, d.f.Fd(), uintptr(req), uintptr(arg))
		if e == 0 {
			return nil
		}
		if e != unix.EINTR {
			return e
		}
	}
}

func (d *device) support() (uint32, string, error) {
	var info unix.WatchdogInfo
	if err := d.ioctl(unix.WDIOC_GETSUPPORT, unsafe.Pointer(&info)); err != nil {
		return 0, "", err
	}
	id, _, _ := bytes.Cut(info.Identity[:], []byte{0})
	return info.Options, string(id), nil
}

func (d *device) get(req uint) (int32, error) {
	var n int32
	err := d.ioctl(req, unsafe.Pointer(&n))
	return n, err
}

func (d *device) bootStatus() (uint32, error) {
	n, err := d.get(unix.WDIOC_GETBOOTSTATUS)
	return uint32(n), err
}

func (d *device) timeout() (int32, error) { return d.get(unix.WDIOC_GETTIMEOUT) }

func (d *device) setTimeout(seconds int32) (int32, error) {
	err := d.ioctl(unix.WDIOC_SETTIMEOUT, unsafe.Pointer(&seconds))
	return seconds, err
}

func (d *device) keepalive() error { return d.ioctl(unix.WDIOC_KEEPALIVE, nil) }

func (d *device) disable() error {
	n := int32(unix.WDIOS_DISABLECARD)
	err := d.ioctl(unix.WDIOC_SETOPTIONS, unsafe.Pointer(&n))
	if errors.Is(err, unix.EBUSY) {
		err = errors.Join(errBusy, err)
	}
	return err
}

func (d *device) write(b byte) error {
	_, err := d.f.Write([]byte{b})
	return err
}

func (d *device) close() error { return d.f.Close() }
