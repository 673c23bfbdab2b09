package serial

import (
	"os"
	"syscall"
	"unsafe"
)

// crtscts switches RTS/CTS on (Linux, include/uapi/asm-generic/termbits-common.h;
// the same on all architectures).
const crtscts = 0x80000000

// hardwareFlow returns a function that switches on RTS/CTS of the port name,
// which the serial library switches off when it opens the port.
func hardwareFlow(name string) (func() error, error) {
	f, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return func() error {
		defer f.Close()
		c, err := f.SyscallConn()
		if err != nil {
			return err
		}
		var t syscall.Termios
		var errno syscall.Errno
		err = c.Control(func(fd uintptr) {
			if _, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TCGETS, uintptr(unsafe.Pointer(&t))); errno == 0 {
				t.Cflag |= crtscts
				_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TCSETS, uintptr(unsafe.Pointer(&t)))
			}
		})
		if err == nil && errno != 0 {
			err = errno
		}
		return err
	}, nil
}
