package soak_test

import (
	"fmt"
	"os"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// openPTY returns what opens one end of a line, and the name of the port at the
// other, which stays open until close is called.
func openPTY(t *testing.T) (line func() (*os.File, error), port string, closeLine func()) {
	t.Helper()
	m, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	c, err := m.SyscallConn()
	require.NoError(t, err)
	control := func(f func(fd uintptr) syscall.Errno) (e syscall.Errno) {
		require.NoError(t, c.Control(func(fd uintptr) { e = f(fd) }))
		return e
	}
	var n, unlock int32
	for req, arg := range map[uintptr]*int32{syscall.TIOCSPTLCK: &unlock, syscall.TIOCGPTN: &n} {
		require.Zero(t, control(func(fd uintptr) syscall.Errno {
			_, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, req, uintptr(unsafe.Pointer(arg)))
			return e
		}))
	}
	port = fmt.Sprintf("/dev/pts/%d", n)
	s, err := os.OpenFile(port, os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	line = func() (*os.File, error) {
		var own uintptr
		if e := control(func(fd uintptr) (e syscall.Errno) {
			own, _, e = syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
			return e
		}); e != 0 {
			return nil, e
		}
		return os.NewFile(own, "ptmx"), nil
	}
	return line, port, func() { s.Close(); m.Close() }
}
