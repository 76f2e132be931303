-- job, epoch -> 1, or -1 stale. Nothing of the job is in storage, so it may be done with any model's weights.
if stale(ARGV[2]) then return -1 end
redis.call('HDEL', job_key(ARGV[1]), 'weights', 'model')
return 1
