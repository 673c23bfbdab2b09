package serial_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/serial"
)

// openPTY returns one end of a line, and the name of the port at the other.
func openPTY(t testing.TB) (*os.File, string) {
	t.Helper()
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("needs pseudo terminals: %v", err)
	}
	t.Cleanup(func() { f.Close() })
	c, err := f.SyscallConn()
	require.NoError(t, err)
	var n, unlock int32
	require.NoError(t, c.Control(func(fd uintptr) {
		for req, arg := range map[uintptr]*int32{syscall.TIOCSPTLCK: &unlock, syscall.TIOCGPTN: &n} {
			if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, req, uintptr(unsafe.Pointer(arg))); e != 0 {
				t.Fatalf("ioctl: %v", e)
			}
		}
	}))
	name := fmt.Sprintf("/dev/pts/%d", n)
	// Without this the other end would echo until the port is opened.
	s, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return f, name
}

// A device at a real port, and a client at another, with a cable between.
func TestPTY(t *testing.T) {
	for _, flow := range []serial.FlowControl{serial.XONXOFF, serial.Hardware, serial.NoFlow} {
		t.Run(fmt.Sprint(flow), func(t *testing.T) {
			before := runtime.NumGoroutine()
			a, deviceName := openPTY(t)
			b, clientName := openPTY(t)
			cable := make(chan error, 2)
			go func() { _, err := io.Copy(a, b); cable <- err }()
			go func() { _, err := io.Copy(b, a); cable <- err }()

			var got bytes.Buffer
			srv := newServer(t, &got)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			o := &serial.Options{FlowControl: flow}
			go func() { ended <- serial.Serve(ctx, srv, deviceName, o) }()
			ch, err := serial.NewChannel(clientName, o)
			require.NoError(t, err)
			c := rpcjson.NewClient(ch, nil)
			data := testData(100000)
			start := time.Now()
			push(t, c, &got, data)
			t.Logf("%d bytes in %v", len(data), time.Since(start))
			if flow == serial.Hardware {
				require.NotZero(t, settings(t, a).Cflag&0x80000000)
			}
			require.Zero(t, settings(t, a).Lflag&syscall.ECHO)
			require.NoError(t, c.Close())
			cancel()
			require.ErrorIs(t, <-ended, context.Canceled)
			require.NoError(t, srv.Close())
			a.Close()
			b.Close()
			<-cable
			<-cable
			require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+1 }, 10*time.Second, 5*time.Millisecond)
		})
	}
}

// settings returns the settings of the port at the other end of f.
func settings(t *testing.T, f *os.File) (s syscall.Termios) {
	c, err := f.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, c.Control(func(fd uintptr) {
		if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TCGETS, uintptr(unsafe.Pointer(&s))); e != 0 {
			t.Errorf("ioctl: %v", e)
		}
	}))
	return s
}

// Close ends a Read, and a Write that nobody takes the data of.
func TestPTYClose(t *testing.T) {
	_, name := openPTY(t)
	p, err := serial.Open(name, nil)
	require.NoError(t, err)
	errs := make(chan error, 2)
	go func() { _, err := p.Read(make([]byte, 10)); errs <- err }()
	writing := make(chan struct{})
	go func() {
		close(writing)
		var err error
		for err == nil {
			_, err = p.Write(make([]byte, 4096))
		}
		errs <- err
	}()
	<-writing
	start := time.Now()
	require.NoError(t, p.Close())
	require.NoError(t, p.Close())
	require.Error(t, <-errs)
	require.Error(t, <-errs)
	require.Less(t, time.Since(start), 10*time.Second)
	_, err = p.Read(make([]byte, 10))
	require.ErrorIs(t, err, os.ErrClosed)
}

// The cable is pulled out.
func TestPTYHangup(t *testing.T) {
	f, name := openPTY(t)
	p, err := serial.Open(name, nil)
	require.NoError(t, err)
	errs := make(chan error, 1)
	go func() { _, err := p.Read(make([]byte, 10)); errs <- err }()
	require.NoError(t, f.Close())
	require.Error(t, <-errs)
	require.NoError(t, p.Close())
}

// BenchmarkPTY pushes 64 KiB over a line of 115200 baud without pauses between
// pieces, and reports how fast that is beside what the line allows for the data in
// base64 alone. The line is two pseudo terminals with a cable between them that takes
// ten bit times for each byte, each way.
//
//	go test -run '^$' -bench PTY -benchtime 1x ./rpcjson/serial
func BenchmarkPTY(b *testing.B) {
	const baud, size = 115200, 64 << 10
	const perByte = 10 * time.Second / baud
	left, deviceName := openPTY(b)
	right, clientName := openPTY(b)
	cable := make(chan error, 2)
	carry := func(to, from *os.File) {
		buf := make([]byte, 64) // 5.6 ms
		free := time.Now()      // when the line has sent what it was given
		for {
			n, err := from.Read(buf)
			if err == nil {
				if now := time.Now(); free.Before(now) {
					free = now
				}
				free = free.Add(time.Duration(n) * perByte)
				time.Sleep(time.Until(free)) // it is the line that takes this long
				_, err = to.Write(buf[:n])
			}
			if err != nil {
				cable <- err
				return
			}
		}
	}
	go carry(left, right)
	go carry(right, left)
	var got bytes.Buffer
	srv := newServer(b, &got)
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	go func() { ended <- serial.Serve(ctx, srv, deviceName, nil) }()
	ch, err := serial.NewChannel(clientName, nil)
	require.NoError(b, err)
	c := rpcjson.NewClient(ch, nil)
	data := testData(size)
	start, n := time.Now(), 0
	for b.Loop() {
		push(b, c, &got, data)
		n++
	}
	bound := time.Duration((size+2)/3*4) * perByte
	b.ReportMetric(float64(n)*bound.Seconds()/time.Since(start).Seconds(), "of-base64")
	b.ReportMetric(float64(n)*size/time.Since(start).Seconds(), "B/s")
	require.NoError(b, c.Close())
	cancel()
	require.ErrorIs(b, <-ended, context.Canceled)
	left.Close()
	right.Close()
	<-cable
	<-cable
}
