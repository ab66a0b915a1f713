#!/bin/sh
# Watches the master that the other sentinels know. Where none knows, the first pod of redis.
set -eu
umask 077
master=$(timeout 5 redis-cli -h redis-sentinel -p 26379 --raw SENTINEL get-master-addr-by-name redismaster | head -n 1) || true
case $master in
redis-*.redis) ;;
*) master=redis-0.redis ;;
esac
# Sentinel rewrites its file; the monitored name is LMCache's default.
cat >/run/redis/sentinel.conf <<END
port 26379
dir /run/redis
requirepass $REDISCLI_AUTH
sentinel sentinel-pass $REDISCLI_AUTH
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $POD_NAME.redis-sentinel
sentinel monitor redismaster $master 6379 2
sentinel auth-pass redismaster $REDISCLI_AUTH
sentinel down-after-milliseconds redismaster 5000
sentinel failover-timeout redismaster 30000
sentinel parallel-syncs redismaster 1
END
exec redis-server /run/redis/sentinel.conf --sentinel
