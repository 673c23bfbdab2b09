package ws

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// pieces reads what comes, write by write.
func pieces(c net.Conn) <-chan string {
	got := make(chan string, 100)
	go func() {
		defer close(got)
		b := make([]byte, 2*coalesced)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			got <- string(b[:n])
		}
	}()
	return got
}

func TestCoalescer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		got := pieces(b)
		c := newCoalescer(a)
		write := func(s string) {
			n, err := io.WriteString(c, s)
			require.NoError(t, err)
			require.Equal(t, len(s), n)
		}
		write("at once")
		require.Equal(t, "at once", <-got)
		require.NoError(t, c.hold(t.Context()))
		require.NoError(t, c.hold(t.Context()))
		write("one ")
		write("two")
		synctest.Wait()
		require.Empty(t, got)
		require.NoError(t, c.release(t.Context()))
		require.Equal(t, "one two", <-got)
		write("three")
		require.NoError(t, c.release(t.Context()))
		require.Equal(t, "three", <-got)
		// No more than that is held back.
		require.NoError(t, c.hold(t.Context()))
		write("x")
		write(strings.Repeat("y", coalesced))
		require.Equal(t, "x", <-got)
		require.Equal(t, strings.Repeat("y", coalesced), <-got)
		require.NoError(t, c.release(t.Context()))

		// Nobody reads on the other side of the next one.
		stuck, other := net.Pipe()
		c = newCoalescer(stuck)
		require.NoError(t, c.hold(t.Context()))
		write("lost")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begun := time.Now()
		require.Error(t, c.release(ctx))
		require.Equal(t, time.Minute, time.Since(begun))
		// hold waits for the write of another, but not past its context.
		require.NoError(t, a.Close())
		require.NoError(t, b.Close())
		a, b = net.Pipe()
		c = newCoalescer(a)
		ended := make(chan error, 1)
		go func() { _, err := c.Write([]byte("stuck")); ended <- err }()
		synctest.Wait()
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.ErrorIs(t, c.hold(ctx), context.DeadlineExceeded)
		for _, k := range []net.Conn{a, b, stuck, other} {
			require.NoError(t, k.Close())
		}
		require.Error(t, <-ended)
	})
}
