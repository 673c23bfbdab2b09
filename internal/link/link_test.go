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
