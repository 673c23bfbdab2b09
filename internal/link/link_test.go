package link

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestCalls(t *testing.T) {
	var c Calls
	one, err := c.Add("1")
	require.NoError(t, err)
	_, err = c.Add("1")
	require.ErrorIs(t, err, ErrInUse)
	two, err := c.Add("2")
	require.NoError(t, err)
	gone, err := c.Add("3")
	require.NoError(t, err)
	c.Remove("3")

	require.False(t, c.Deliver("9", nil))
	require.False(t, c.Deliver("3", nil))
	require.True(t, c.Deliver("2", []byte("r")))
	require.False(t, c.Deliver("2", []byte("again")))
	require.Equal(t, "r", string(<-two))

	lost := errors.New("lost")
	require.NoError(t, c.Err())
	c.Fail(lost)
	c.Fail(errors.New("another reason"))
	_, ok := <-one
	require.False(t, ok)
	require.Empty(t, gone)
	_, err = c.Add("4")
	require.Equal(t, lost, err)
	require.Equal(t, lost, c.Err())
}

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := Backoff{Min: time.Second, Max: time.Minute}
		for range 100 {
			b.Reset()
			for limit := 2 * time.Second; ; limit *= 2 {
				limit = min(limit, time.Minute)
				d := b.Next()
				require.GreaterOrEqual(t, d, limit/2)
				require.LessOrEqual(t, d, limit)
				if limit == time.Minute {
					break
				}
			}
		}
		begun := time.Now()
		require.NoError(t, b.Wait(t.Context()))
		require.GreaterOrEqual(t, time.Since(begun), 30*time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		require.ErrorIs(t, b.Wait(ctx), context.DeadlineExceeded)
	})
}

func TestID(t *testing.T) {
	for frame, want := range map[string]string{
		`{"src":"a","id":1234567890123,"method":"x"}`: "1234567890123",
		`{"params":{"id":1},"id":"b"}`:                "b",
		`{"src":"a","id":7,"params":broken`:           "7",
		`{"id":null}`:                                 "",
		`{"id":""}`:                                   "",
		`{"id":[1]}`:                                  "",
		`{"method":"x"}`:                              "",
		`[1]`:                                         "",
		`{"a`:                                         "",
		`{"a":`:                                       "",
		``:                                            "",
	} {
		got, err := ID([]byte(frame))
		require.Equal(t, want == "", err != nil, "%s", frame)
		require.Equal(t, want, got, "%s", frame)
	}
}

func TestRedial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		b := Backoff{Min: time.Second, Max: time.Minute}
		final := errors.New("final")
		var begun []time.Time
		require.ErrorIs(t, b.Redial(ctx, func() (bool, error) {
			begun = append(begun, time.Now())
			if len(begun) == 4 {
				time.Sleep(time.Minute) // a connection that lasts
			}
			return len(begun) == 6, final
		}), final)
		require.Len(t, begun, 6)
		for i, d := range []time.Duration{1, 2, 4, 61, 2} {
			pause := begun[i+1].Sub(begun[i])
			most := 2 * d * time.Second
			if d == 61 { // the pauses begin anew
				most = 62 * time.Second
			}
			require.GreaterOrEqual(t, pause, d*time.Second, i)
			require.LessOrEqual(t, pause, most, i)
		}
		cause := errors.New("cause")
		ctx2, end := context.WithCancelCause(t.Context())
		require.ErrorIs(t, b.Redial(ctx2, func() (bool, error) { end(cause); return true, final }), cause)
		cancel()
		require.ErrorIs(t, b.Redial(ctx, func() (bool, error) { return false, nil }), context.Canceled)
	})
}

func TestBuffers(t *testing.T) {
	var b Buffers
	for _, n := range []int{0, 1, pooled - 1, pooled, 100_000} {
		for range 3 {
			buf := b.Get(n)
			require.Empty(t, buf)
			require.GreaterOrEqual(t, cap(buf), n)
			b.Put(append(buf, make([]byte, n)...))
		}
	}
	b.Put(nil)
}
