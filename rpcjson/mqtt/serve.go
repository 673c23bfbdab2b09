package mqtt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/link"
	"github.com/slotota/ota/rpcjson"
)

// Defaults of ServeOptions.
const (
	DefaultMaxPending = 64
	DefaultMinDelay   = time.Second
	DefaultMaxDelay   = time.Minute
	DefaultResumeFor  = 2 * time.Minute
)

const (
	windowSize = 1024 // messages that are remembered
	queueSize  = 1024 // messages that wait to be looked at
	queueBulk  = 32   // the same, if they are as long as they may be
	replyFor   = time.Minute
)

// ServeOptions configure [Serve]. The zero value is safe.
type ServeOptions struct {
	Dial DialOptions
	// StatusTopic, if not "", gets the retained message "online" when the device
	// is connected, and "offline" when it is not any more, also if the broker
	// finds that out (the will).
	StatusTopic string
	// MaxPending bounds the messages that are being served at a time. Others wait
	// at the broker. 0 means DefaultMaxPending. It should be larger than MaxPending
	// of [rpcjson.Options], for that answers the calls that are too many.
	MaxPending int
	// MinDelay and MaxDelay bound the pause before another attempt to connect.
	// It doubles with each, and is random within that. A connection that
	// lasted for MaxDelay lets it start anew. 0 means DefaultMinDelay and
	// DefaultMaxDelay.
	MinDelay, MaxDelay time.Duration
	// ResumeFor is how long after the end of a connection calls are served that
	// came to the broker meanwhile. After that, and when Serve begins, they are
	// dropped: nobody waits for their replies any more, and a device that is
	// told what somebody wanted hours ago, or before its last reboot, may do
	// the wrong thing. 0 means DefaultResumeFor; a negative value drops all.
	ResumeFor time.Duration
	// Logger gets a line for each connection and for what is refused; nil means
	// silence.
	Logger *slog.Logger
}

func (o *ServeOptions) complete() (ServeOptions, error) {
	var c ServeOptions
	if o != nil {
		c = *o
	}
	if c.MaxPending <= 0 {
		c.MaxPending = DefaultMaxPending
	}
	if c.MinDelay <= 0 {
		c.MinDelay = DefaultMinDelay
	}
	if c.MaxDelay <= 0 {
		c.MaxDelay = max(DefaultMaxDelay, c.MinDelay)
	}
	if c.ResumeFor == 0 {
		c.ResumeFor = DefaultResumeFor
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.MaxDelay < c.MinDelay {
		return c, fmt.Errorf("mqtt: MaxDelay %v: need at least MinDelay %v: %w", c.MaxDelay, c.MinDelay, ota.ErrInvalid)
	}
	if c.StatusTopic != "" {
		if err := checkTopic(c.StatusTopic); err != nil {
			return c, fmt.Errorf("mqtt: StatusTopic %s: %w: %w", ota.Quote(c.StatusTopic), err, ota.ErrInvalid)
		}
	}
	return c, nil
}

// Serve connects to the broker at rawURL and serves the calls for srv that come
// there, and does so again whenever the connection breaks, until ctx ends. It
// returns the cause of ctx, [rpcjson.ErrClosed] at the first call after srv has
// been closed, or at once an error that wraps [ota.ErrInvalid]. o may be nil.
//
//	mqtt://[USER:PASSWORD@]HOST[:PORT]     port 1883 unless given
//	mqtts://[USER:PASSWORD@]HOST[:PORT]    port 8883 unless given
//
// Calls come to ID/rpc, and to ID/rpc/METHOD if the broker allows that
// subscription; there the topic names the method, and a frame that names another
// one is refused. Ignored are frames that cannot be understood, requests that want
// a reply but have no src which it could be published to, retained messages (which
// would come again with each connection), and copies of a message that came
// before: a call is executed and answered once, however often it is delivered. For
// that the last 1024 messages are remembered, over broken connections, for 5
// minutes, and for one minute against copies that the broker does not mark.
//
// A message is acknowledged before it is served, so that a call that restarts the
// device is not delivered to it again.
func Serve(ctx context.Context, srv *rpcjson.Server, rawURL string, o *ServeOptions) error {
	opts, err := o.complete()
	if err != nil {
		return err
	}
	b, path, err := newBroker(rawURL, &opts.Dial)
	switch {
	case err != nil:
		return err
	case path != "":
		return fmt.Errorf("mqtt: URL with the path %s; the topic is that of the device: %w", ota.Quote(path), ota.ErrInvalid)
	}
	s := &server{srv: srv, o: opts, b: b, log: opts.Logger, seen: newWindow(windowSize)}
	if err := checkTopic(srv.ID()); err != nil {
		return fmt.Errorf("mqtt: device id %s: %w: %w", ota.Quote(srv.ID()), err, ota.ErrInvalid)
	}
	if b.clientID == "" {
		b.clientID = srv.ID()
	}
	s.topic = srv.ID() + "/rpc"
	s.slots = make(chan struct{}, opts.MaxPending)
	s.changed = make(chan struct{})
	return s.serve(ctx)
}

// server is one Serve.
type server struct {
	srv   *rpcjson.Server
	o     ServeOptions
	b     *broker
	log   *slog.Logger
	topic string
	slots chan struct{} // an element for each message being served
	seen  *window

	stop context.CancelCauseFunc
	wg   sync.WaitGroup // calls

	mu      sync.Mutex // guards what follows
	conn    *conn      // nil if there is none
	changed chan struct{}
}

func (s *server) serve(ctx context.Context) error {
	ctx, s.stop = context.WithCancelCause(ctx)
	defer s.wg.Wait()
	defer s.stop(nil)
	var lost time.Time // when the device was last connected
	b := link.Backoff{Min: s.o.MinDelay, Max: s.o.MaxDelay}
	return b.Redial(ctx, func() (final bool, err error) {
		served, err := s.session(ctx, lost.IsZero() || time.Since(lost) > s.o.ResumeFor)
		if ctx.Err() == nil {
			s.log.Warn("mqtt connection lost", "broker", s.b.addr, "err", err)
		}
		if served {
			lost = time.Now()
		}
		return false, err
	})
}

// session is one connection. fresh says that what waits at the broker is to be
// dropped. served reports whether calls could come.
func (s *server) session(ctx context.Context, fresh bool) (served bool, err error) {
	q := newQueue(s.srv.MaxFrame())
	c, err := s.connect(ctx, false, q)
	if err == nil && fresh && c.resumed {
		s.log.Info("mqtt: dropping what waits at the broker", "broker", s.b.addr)
		c.close()
		// To connect with a clean session makes the broker forget.
		q = newQueue(s.srv.MaxFrame())
		if c, err = s.connect(ctx, true, q); err == nil {
			c.close()
			pause(ctx, settleTime)
			c, err = s.connect(ctx, false, q)
		}
	}
	if err != nil {
		return false, err
	}
	defer c.close()
	defer context.AfterFunc(ctx, c.hurry)()
	if err := s.subscribe(ctx, c); err != nil {
		return false, err
	}
	s.log.Info("mqtt connected", "broker", s.b.addr, "resumed", c.resumed)
	s.use(c)
	defer s.use(nil)
	if topic := s.o.StatusTopic; topic != "" {
		// Also if ctx ends before "online" is acknowledged: it may have come.
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
			defer cancel()
			_ = c.publish(ctx, topic, true, []byte("offline"))
		}()
		if err := c.publish(ctx, topic, true, []byte("online")); err != nil {
			return true, err
		}
	}
	for {
		// Without a place nothing is taken, and the broker, which has no
		// acknowledgement, sends only so much.
		select {
		case s.slots <- struct{}{}:
		case <-c.lost:
			return true, c.reason()
		case <-ctx.Done():
			return true, context.Cause(ctx)
		}
		select {
		case m := <-q.c:
			q.taken(m)
			m.Ack()
			s.take(ctx, m)
			continue
		case <-c.lost:
			err = c.reason()
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		<-s.slots
		return true, err
	}
}

// queue holds messages that came and were not looked at, up to a number and a size.
type queue struct {
	c    chan paho.Message
	room atomic.Int64 // bytes
}

func newQueue(maxFrame int) *queue {
	q := &queue{c: make(chan paho.Message, queueSize)}
	q.room.Store(queueBulk * int64(maxFrame))
	return q
}

// put adds m, if there is room.
func (q *queue) put(m paho.Message) bool {
	n := int64(len(m.Payload()))
	if q.room.Add(-n) >= 0 {
		select {
		case q.c <- m:
			return true
		default:
		}
	}
	q.room.Add(n)
	return false
}

// taken makes room after m was received.
func (q *queue) taken(m paho.Message) { q.room.Add(int64(len(m.Payload()))) }

func (s *server) connect(ctx context.Context, clean bool, q *queue) (*conn, error) {
	cfg := connConfig{
		clean:      clean,
		ackLater:   true,
		maxPayload: s.srv.MaxFrame,
		onMessage: func(m paho.Message) {
			if !q.put(m) { // a broker that does not wait for acknowledgements
				m.Ack()
				s.log.Warn("mqtt: too many messages at once, one dropped", "topic", ota.Quote(m.Topic()))
			}
		},
	}
	if !clean {
		cfg.will, cfg.willTopic = "offline", s.o.StatusTopic
	}
	return s.b.connect(ctx, cfg)
}

// subscribe asks for calls. The filter ID/rpc/# comprises ID/rpc, but not every
// broker allows every device wildcards.
func (s *server) subscribe(ctx context.Context, c *conn) error {
	err := c.subscribe(ctx, s.topic+"/#")
	var refused *rpcjson.Error
	if errors.As(err, &refused) {
		s.log.Debug("mqtt: without wildcard", "err", err)
		err = c.subscribe(ctx, s.topic)
	}
	return err
}

// use makes c the connection for replies.
func (s *server) use(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = c
	close(s.changed)
	s.changed = make(chan struct{})
}

// current returns the connection for replies, waiting until there is one other
// than not.
func (s *server) current(ctx context.Context, not *conn) (*conn, error) {
	for {
		s.mu.Lock()
		c, changed := s.conn, s.changed
		s.mu.Unlock()
		if c != nil && c != not {
			return c, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// take looks at a message and serves it, or ignores it, and gives back its place.
func (s *server) take(ctx context.Context, m paho.Message) {
	frame, h, err := s.open(m)
	if err != nil {
		level := slog.LevelWarn
		if errors.Is(err, errCopy) || errors.Is(err, rpcjson.ErrInvalidFrame) {
			level = slog.LevelDebug // as may happen
		}
		s.log.Log(ctx, level, "mqtt: ignored", "topic", ota.Quote(m.Topic()), "err", err)
		<-s.slots
		return
	}
	s.wg.Go(func() {
		defer func() { <-s.slots }()
		send := func(reply []byte) error { return s.reply(ctx, h.Src+"/rpc", reply) }
		var err error
		if named, ok := s.methodOf(m.Topic()); ok && !strings.EqualFold(named, h.Method) {
			e := &rpcjson.Error{Code: 400, Message: "bad request: the topic names another method"}
			if reply := s.srv.RefuseFrame(frame, e); reply != nil {
				err = send(reply)
			}
		} else {
			err = s.srv.Serve(ctx, rpcjson.Peer{Channel: "MQTT", Addr: s.b.addr}, frame, send)
		}
		switch {
		case errors.Is(err, rpcjson.ErrClosed):
			s.stop(err)
		case err != nil:
			s.log.Warn("mqtt: not answered", "src", ota.Quote(h.Src), "err", err)
		}
	})
}

// open returns the frame in a message that is to be served, or why it is not.
func (s *server) open(m paho.Message) (frame []byte, h rpcjson.Header, err error) {
	frame = m.Payload()
	if m.Retained() {
		return nil, h, errors.New("retained")
	}
	if len(frame) > s.srv.MaxFrame() {
		return nil, h, fmt.Errorf("more than %d bytes: %w", s.srv.MaxFrame(), ota.ErrTooLarge)
	}
	if method, ok := s.methodOf(m.Topic()); ok {
		if frame, err = withMethod(frame, method); err != nil {
			return nil, h, err
		}
	} else if m.Topic() != s.topic {
		return nil, h, errors.New("not one of the topics subscribed to")
	}
	h, err = rpcjson.ParseHeader(frame)
	switch {
	case err != nil:
		return nil, h, err
	case h.Method == "" || h.Reply:
		return nil, h, fmt.Errorf("%w: no request", rpcjson.ErrInvalidFrame)
	}
	limit := unmarked
	switch {
	case h.ID != "":
		if err := s.checkSrc(h.Src); err != nil {
			return nil, h, fmt.Errorf("src %s: %w", ota.Quote(h.Src), err)
		}
	default:
		limit = 0 // cannot be told from a new one
	}
	if m.Duplicate() {
		limit = marked
	}
	if s.seen.copied(keyOf(m.Topic(), m.Payload()), time.Now(), limit) {
		return nil, h, errCopy
	}
	return frame, h, nil
}

var errCopy = errors.New("a copy of a message that came before")

// methodOf returns the method that a topic names.
func (s *server) methodOf(topic string) (string, bool) {
	return strings.CutPrefix(topic, s.topic+"/")
}

// checkSrc returns nil if replies to src may be published: to a valid topic that
// is none for calls of this device.
func (s *server) checkSrc(src string) error {
	if err := checkTopic(src); err != nil {
		return err
	}
	if t := src + "/rpc"; t == s.topic || strings.HasPrefix(t, s.topic+"/") {
		return errors.New("a topic of this device")
	}
	return nil
}

// withMethod adds the method to a frame, which may be empty.
func withMethod(frame []byte, method string) ([]byte, error) {
	if len(method) > 128 || strings.ContainsFunc(method, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '"' || r == '\\' || r == '/'
	}) {
		return nil, errors.New("the topic names no method")
	}
	frame = bytes.TrimLeft(frame, " \t\r\n")
	if len(frame) == 0 {
		frame = []byte("{}")
	}
	if frame[0] != '{' {
		return nil, fmt.Errorf("%w: need an object", rpcjson.ErrInvalidFrame)
	}
	b := append([]byte(`{"method":"`), method...)
	b = append(b, `",`...) // more commas than needed are no matter
	return append(b, frame[1:]...), nil
}

// reply publishes a reply, over the next connection if this one breaks.
func (s *server) reply(ctx context.Context, topic string, reply []byte) error {
	ctx, cancel := context.WithTimeout(ctx, replyFor)
	defer cancel()
	var c *conn
	for {
		var err error
		if c, err = s.current(ctx, c); err != nil {
			return err
		}
		if err = c.publish(ctx, topic, false, reply); err == nil || ctx.Err() != nil {
			return err
		}
		t := time.NewTimer(100 * time.Millisecond)
		select {
		case <-c.lost:
		case <-t.C:
			c = nil // it was only busy
		}
		t.Stop()
	}
}

// pause waits, not longer than ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
